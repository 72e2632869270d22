"""What `weaver-rl check` looks at before a GPU hour is spent: small checks, each with what it saw and what to do."""
