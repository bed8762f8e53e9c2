"""What clients send and receive: the Open Inference Protocol and the plain routes."""
