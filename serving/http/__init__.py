"""The engine over HTTP: OpenAI's completions and chat, health, and figures."""
