"""A patient's place between 0 and 1, by which a share of the patients is chosen."""

import hashlib


def patient_fraction(patient: str) -> float:
    """Number from 0 to below 1 that follows from the patient's name alone.

    Patients below a share are about that share of all of them, and no patient's place depends on
    the others.
    """
    digest = hashlib.sha256(patient.encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32
