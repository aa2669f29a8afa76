"""DICOM series of CTs: headers, choice of a series, position of its slices, pixels.

Patients' names, ids and dates of birth are not kept, but for DICOM results of a prediction
(`source_headers`): slices are told apart by a hash of them.
"""
