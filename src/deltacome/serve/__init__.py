"""The embedded server: OpenAI's API over many tenants in one running batch."""
