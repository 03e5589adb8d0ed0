"""WebShop's search engine: what Lucene answers to a bag of words, without Java."""
