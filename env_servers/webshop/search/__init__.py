"""WebShop's search engine: Lucene's ranking for a bag of words, without Java."""
