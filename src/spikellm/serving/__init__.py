"""A server that speaks the OpenAI protocol: several generations in one native step each token."""
