"""The API's objects, in OpenAI's format; our additions are in `adapter` and `olora`."""
