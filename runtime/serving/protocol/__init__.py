"""What clients send and get: the Open Inference Protocol and the plain routes."""
