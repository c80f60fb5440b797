"""One DICOM chest film on disk."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from cmcgns.data.phantom.draws import digest

_DX_FOR_PRESENTATION = "1.2.840.10008.5.1.4.1.1.1.1"
_EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"


def write_dicom(
    path: Path,
    pixels: npt.NDArray[np.uint16],
    *,
    photometric: str,
    window: tuple[float, float],
    patient_id: str,
    study_id: str,
    image_id: str,
    view: str,
) -> None:
    """Write ``pixels``, 12 bits stored in 16, as a digital X-ray in Explicit VR Little Endian.

    ``photometric`` is MONOCHROME1 or MONOCHROME2, ``window`` is (center, width).
    """
    # data/dicom.py is pydicom's door for reading; this lone writer serves tests, hence the import in here
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _DX_FOR_PRESENTATION
    meta.MediaStorageSOPInstanceUID = _uid(image_id)
    meta.TransferSyntaxUID = _EXPLICIT_VR_LITTLE_ENDIAN
    meta.ImplementationClassUID = _uid("cmcgns phantom")
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = _uid(study_id), _uid(study_id, view)
    data.PatientID, data.StudyID, data.PatientName = patient_id, study_id, ""
    data.Modality, data.BodyPartExamined, data.ViewPosition = "DX", "CHEST", view
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, photometric
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.WindowCenter, data.WindowWidth = window
    data.PixelData = pixels.astype("<u2").tobytes()
    data["PixelData"].VR = "OW"
    data.save_as(path, enforce_file_format=True)


def _uid(*key: object) -> str:
    """A UID under the root for UUID-like numbers, from ``key`` alone."""
    return f"2.25.{int.from_bytes(digest(*key)[:15], 'big')}"
