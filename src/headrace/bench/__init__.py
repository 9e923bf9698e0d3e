"""Load generator and its reports, for any OpenAI server."""
