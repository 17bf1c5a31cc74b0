"""The objects of the API, in OpenAI's shapes; what is ours stands under `adapter` and `olora`."""
