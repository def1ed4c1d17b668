"""Readers of raw image sources: image folder, tar/webdataset, zip, Parquet and the CIFAR-10 sheets.

Every reader lists candidates first (`source.list_source`: key, class, place; no pixel is read) and
yields their bytes or pixels later (`source.read_records`), so that selection and shuffling need no
decoding. No decoding happens here.
"""
