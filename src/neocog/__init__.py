"""neocog: convolution and pooling layers for PyTorch, compiled for each layer."""
