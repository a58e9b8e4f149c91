"""Models and results to and from other programs: the released code's weights, nnU-Net plans, DICOM-SEG."""
