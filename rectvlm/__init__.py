"""ReCT-VLM: train 3D chest-CT vision-language models from CT-RATE to a 4-bit 70B language model."""

__version__ = "0.1.0"
