"""Search: an index over the films and reports of a corpus, its nearest cases to a film or a text, and a web page."""
