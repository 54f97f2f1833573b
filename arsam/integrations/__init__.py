"""ARSAM inside other people's training loops; each module imports its framework, and arsam imports none of them."""
