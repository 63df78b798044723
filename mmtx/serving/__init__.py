"""`mmtx serve`: one model behind an OpenAI-compatible API."""
