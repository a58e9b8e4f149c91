"""Codes of segments: which SNOMED CT terms stand for a label's name, so that viewers know what they show."""

from __future__ import annotations

import re
from dataclasses import dataclass

ANATOMY = ("91723000", "Anatomical Structure")
ABNORMAL = ("49755003", "Morphologically Abnormal Structure")
TISSUE = ("85756007", "Tissue")

_SIDES = {"left": ("7771000", "Left"), "right": ("24028007", "Right")}

# Words of a name (each a regular expression for whole words) and the term they stand for.
_FINDINGS = (
    (r"tumou?rs?|cancer|neoplasms?|metastas[ei]s|carcinoma", ("108369006", "Neoplasm")),
    (r"nodules?", ("27925004", "Nodule")),
    (r"cysts?", ("367643001", "Cyst")),
    (r"o?edema", ("79654002", "Edema")),
    (r"necrosis|necrotic", ("6574001", "Necrosis")),
    (r"thromb(us|i)", ("396339007", "Thrombus")),
    (r"mass(es)?", ("4147007", "Mass")),
    (r"lesions?", ("52988006", "Lesion")),
)
_VESSELS = (
    (r"aorta", ("15825003", "Aorta")),
    (r"inferior vena cava|ivc|postcava", ("64131007", "Inferior vena cava")),
    (r"portal veins?", ("32764006", "Portal vein")),
    (r"hepatic veins?", ("8993003", "Hepatic vein")),
    (r"hepatic arter(y|ies)", ("76015000", "Hepatic artery")),
    (r"pulmonary arter(y|ies)", ("81040000", "Pulmonary artery")),
    (r"pulmonary veins?", ("122972007", "Pulmonary vein")),
    (r"arter(y|ies)", ("51114001", "Artery")),
    (r"veins?", ("29092000", "Vein")),
    (r"(blood ?)?vessels?|vasculature", ("59820001", "Blood Vessel")),
)
_ORGANS = (
    (r"liver|hepatic", ("10200004", "Liver")),
    (r"airways?", ("89187006", "Airway structure")),
    (r"trachea", ("44567001", "Trachea")),
    (r"bronch(us|i)", ("955009", "Bronchus")),
    (r"lungs?|pulmonary", ("39607008", "Lung")),
    (r"hippocamp(us|i|al)", ("5366008", "Hippocampus")),
    (r"brain", ("12738006", "Brain")),
    (r"left atrium", ("82471001", "Left atrium")),
    (r"left ventricle", ("87878005", "Left ventricle")),
    (r"right ventricle", ("53085002", "Right ventricle")),
    (r"heart|cardiac", ("80891009", "Heart")),
    (r"kidneys?|renal", ("64033007", "Kidney")),
    (r"adrenal( gland)?s?", ("23451007", "Adrenal gland")),
    (r"spleen", ("78961009", "Spleen")),
    (r"pancreas|pancreatic", ("15776009", "Pancreas")),
    (r"gall ?bladder", ("28231008", "Gallbladder")),
    (r"o?esophagus", ("32849002", "Esophagus")),
    (r"stomach", ("69695003", "Stomach")),
    (r"duodenum", ("38848004", "Duodenum")),
    (r"small (bowel|intestine)", ("30315005", "Small intestine")),
    (r"colon", ("71854001", "Colon")),
    (r"prostate", ("41216001", "Prostate")),
    (r"spinal cord", ("2748008", "Spinal cord")),
    (r"vertebrae?", ("51282000", "Vertebra")),
    (r"ribs?", ("113197003", "Rib")),
    (r"clavicles?", ("51299004", "Clavicle")),
    (r"femurs?", ("71341001", "Femur")),
    (r"bones?", ("272673000", "Bone")),
    (r"lymph nodes?", ("59441001", "Lymph Node")),
)


@dataclass(frozen=True)
class SegmentCode:
    """Category and type of a segment, the organ it lies in and the side, each (SNOMED CT code, meaning) or None."""

    category: tuple[str, str]
    kind: tuple[str, str]
    region: tuple[str, str] | None = None
    side: tuple[str, str] | None = None


def segment_code(name: str) -> SegmentCode:
    """Return the codes for a label's name, by its English words: "left_lung", "liver tumour", "hepatic-vessels".

    A finding (tumour, cyst, ...) or a vessel is the type, and an organ named beside it the region; else the organ is
    the type. A name that holds no known word is "Tissue", which says nothing wrong. Codes: SNOMED CT, as in DICOM CIDs
    7150 and 7151.
    """
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    words = " ".join(re.split(r"[^a-z0-9]+", words.lower())).strip()
    side = next((code for word, code in _SIDES.items() if re.search(rf"\b{word}\b", words)), None)
    organ, vessel, finding = (_first(words, table) for table in (_ORGANS, _VESSELS, _FINDINGS))
    if finding is not None:
        return SegmentCode(ABNORMAL, finding, vessel or organ, side)
    if vessel is not None:
        # "Hepatic vein" names its organ already.
        known = vessel[1] not in ("Artery", "Vein", "Blood Vessel")
        return SegmentCode(ANATOMY, vessel, None if known else organ, side)
    if organ is not None:
        return SegmentCode(ANATOMY, organ, None, None if side and side[1].lower() in organ[1].lower() else side)
    return SegmentCode(TISSUE, TISSUE, None, side)


def _first(words: str, table: tuple[tuple[str, tuple[str, str]], ...]) -> tuple[str, str] | None:
    return next((code for pattern, code in table if re.search(rf"\b({pattern})\b", words)), None)
