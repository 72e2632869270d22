"""What a command says and ends with when it was interrupted. It ends nothing."""

INTERRUPTED = "interrupted; nothing was left running"
INTERRUPTED_STATUS = 130
