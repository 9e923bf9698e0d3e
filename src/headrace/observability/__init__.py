"""Every metric and log field, defined once."""
