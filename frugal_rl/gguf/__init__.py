"""GGUF, llama.cpp's file format: written from a checkpoint, read, and patched in place."""
