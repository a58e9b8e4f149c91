"""Images: files (NIfTI, PNG, DICOM) to and from Volume, whole or a block at a time; import from the modules."""
