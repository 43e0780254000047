"""GGUF files for llama.cpp of adapters and merged models, and Modelfiles for Ollama."""
