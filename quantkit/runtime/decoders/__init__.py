"""What turns a step's tokens into logits: a decoder of our own where it is proved to be the model, else transformers' own modeling code."""

from quantkit.runtime.decoders.decoder import Decoder, decoder_of

__all__ = ["Decoder", "decoder_of"]
