"""Images: files (NIfTI, PNG, DICOM) to and from Volume, whole or a block at a time.

Names are imported from the modules themselves, so that nothing heavy is loaded before it is used.
"""
