"""Other libraries' classes over an engine: change one import. Each library is one file.

>>> from npu_proxy.compat.sentence_transformers import SentenceTransformer    # in place of sentence_transformers
"""
