"""The processes that compute one model together: how they start, what they are told, how they end."""
