"""Models for use elsewhere: ONNX and torch.export files that take decoded images, and folders for the Hugging Face Hub."""
