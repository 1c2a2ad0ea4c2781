"""What is known of a decoder: its blocks, its linears, who shares an input, and how to run it block by block."""
