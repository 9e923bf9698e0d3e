"""What takes minutes or further environments: `make test-slow`."""
