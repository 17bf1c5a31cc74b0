"""The HTTP API on FastAPI, in the format of OpenAI's fine-tuning API. Never loads torch."""
