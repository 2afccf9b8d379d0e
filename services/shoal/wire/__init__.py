"""The wire: messages to protobuf and back, errors to statuses and back, channel and server options."""
