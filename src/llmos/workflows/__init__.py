"""What a user can do: one file per thing, each with one function `run`."""
