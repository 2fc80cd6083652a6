"""From a base and an adapter on disk to what others load. It reads and writes files, tensor by tensor; no model is built in memory."""
