"""A trained model to the Hugging Face hub: which licence it is under (`license.py`), its card (`card.py`), that what is sent is whole
and tells nothing private (`contents.py`), and the sending (`upload.py`). What a user sees of it is in `workflow/publishing.py`."""
