"""FastAPI: the HTTP surface, in the shapes of OpenAI's fine-tuning API. Never loads torch."""
