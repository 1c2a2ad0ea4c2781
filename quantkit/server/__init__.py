"""The HTTP server: one model behind OpenAI's API."""
