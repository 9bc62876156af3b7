"""From texts to vectors: tokenize, queue, pack, infer, finish. Files in the order in which a text meets them."""
