"""`mmtx serve`: one model behind an address that clients of OpenAI's API speak to."""
