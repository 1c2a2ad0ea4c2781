"""OpenAI's endpoints: their requests and responses to the letter."""
