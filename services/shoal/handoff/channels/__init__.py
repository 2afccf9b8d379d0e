"""What frames of a session travel over: memory (with injected faults), grpc."""
