"""Phrases of the reports: several wordings per fact, with slots for size, side and location."""

from cmcgns.phantom.findings import Finding

SIZE: dict[str, dict[str, tuple[str, ...]]] = {
    "effusion": {"mild": ("small", "trace", "small"), "moderate": ("moderate", "moderate-sized"), "severe": ("large",)},
    "pneumothorax": {"mild": ("small", "tiny"), "moderate": ("moderate", "moderate-sized"), "severe": ("large",)},
    "edema": {"mild": ("mild",), "moderate": ("moderate",), "severe": ("severe",)},
    "consolidation": {"mild": ("patchy", "ill-defined"), "moderate": ("moderate",), "severe": ("dense", "extensive")},
    "atelectasis": {"mild": ("minimal", "mild"), "moderate": ("moderate",), "severe": ("marked", "extensive")},
    "cardiomegaly": {"mild": ("mild",), "moderate": ("moderate",), "severe": ("severe", "marked")},
}

PLACE = {
    ("right", "upper"): ("right upper lobe", "right upper lung", "right upper zone"),
    ("right", "mid"): ("right mid lung", "right mid lung zone", "right middle zone"),
    ("right", "lower"): ("right lower lobe", "right lung base", "right lower lung"),
    ("left", "upper"): ("left upper lobe", "left upper lung", "left upper zone"),
    ("left", "mid"): ("left mid lung", "left mid lung zone", "left middle zone"),
    ("left", "lower"): ("left lower lobe", "left lung base", "left lower lung"),
}

BASE = {
    "right": ("right lung base", "right base", "right lower lobe"),
    "left": ("left lung base", "left base", "left lower lobe"),
    "bilateral": ("both lung bases", "bilateral lung bases", "both lower lobes"),
}

SENTENCES: dict[str, tuple[str, ...]] = {
    "effusion": (
        "There is a {size} {side} pleural effusion.",
        "A {size} {side} pleural effusion is present.",
        "{Size} {side} pleural effusion is seen.",
        "{Size} {side}-sided pleural effusion.",
        "A {size} pleural effusion is noted on the {side}.",
        "Layering {size} {side} pleural effusion.",
        "Opacity at the {side} base with a meniscus represents a {size} pleural effusion.",
    ),
    "effusion mild": (
        "Blunting of the {side} costophrenic angle is consistent with a {size} pleural effusion.",
        "The {side} costophrenic angle is blunted, suggesting a {size} pleural effusion.",
    ),
    "effusion bilateral": (
        "There are {size} bilateral pleural effusions.",
        "Bilateral pleural effusions are {size}.",
        "{Size} bilateral pleural effusions are present.",
        "{Size} pleural effusions are seen on both sides.",
        "Both costophrenic angles are obscured by {size} pleural effusions.",
    ),
    "pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "{Size} {side} apical pneumothorax is present.",
        "A {size} {side}-sided pneumothorax is seen.",
        "A {side} visceral pleural line is visible, compatible with a {size} pneumothorax.",
        "Lucency without lung markings at the {side} apex represents a {size} pneumothorax.",
        "{Size} pneumothorax on the {side}.",
    ),
    "consolidation": (
        "There is {size} consolidation in the {place}.",
        "{Size} opacity in the {place} is compatible with consolidation.",
        "{Size} airspace consolidation is seen in the {place}.",
        "{Size} opacification of the {place} with air bronchograms.",
        "A {size} airspace opacity is present in the {place}, concerning for pneumonia.",
        "{Size} consolidation projects over the {place}.",
        "The {place} shows {size} consolidation, likely pneumonia.",
    ),
    "edema": (
        "There is {size} pulmonary edema.",
        "{Size} pulmonary edema is present.",
        "Perihilar haze and septal lines are consistent with {size} pulmonary edema.",
        "Bilateral perihilar opacities represent {size} pulmonary edema.",
        "Pulmonary vascular congestion with {size} interstitial edema.",
        "Indistinct vessels and Kerley B lines suggest {size} pulmonary edema.",
    ),
    "atelectasis": (
        "There is {size} atelectasis at the {place}.",
        "{Size} linear atelectasis in the {place}.",
        "Band-like opacity in the {place} represents {size} atelectasis.",
        "{Size} plate-like atelectasis is seen at the {place}.",
        "Linear opacities at the {place} are compatible with {size} atelectasis.",
        "{Size} subsegmental atelectasis is noted in the {place}.",
    ),
    "nodule": (
        "There is a {length} nodule in the {place}.",
        "A {length} nodular opacity projects over the {place}.",
        "A round {length} nodule is seen in the {place}.",
        "Well-defined nodule in the {place} measures {length}.",
        "{Place} nodule measuring approximately {length}.",
    ),
    "cardiomegaly": (
        "There is {size} cardiomegaly.",
        "{Size} cardiomegaly is present.",
        "The heart is {sizely} enlarged.",
        "Heart size is {sizely} enlarged.",
        "{Size} enlargement of the cardiac silhouette.",
        "The cardiac silhouette is {sizely} enlarged.",
    ),
    "pacemaker": (
        "{Side}-sided pacemaker with leads in the right heart.",
        "A {side} chest wall pacemaker is in place.",
        "A {side} pectoral pacemaker is present with intact leads.",
        "{Side} pacemaker leads are in standard position.",
    ),
    "sternotomy wires": (
        "Median sternotomy wires are intact.",
        "The patient is status post median sternotomy with intact wires.",
        "Sternotomy wires are aligned.",
        "Midline sternotomy wires are noted.",
    ),
    "endotracheal tube": (
        "The endotracheal tube terminates {length} above the carina.",
        "Endotracheal tube tip is {length} above the carina.",
        "An endotracheal tube ends {length} from the carina.",
        "ET tube is in place, tip {length} above the carina.",
    ),
    "enteric tube": (
        "An enteric tube courses below the diaphragm into the stomach.",
        "Enteric tube tip is in the stomach.",
        "A nasogastric tube passes below the left hemidiaphragm.",
        "Orogastric tube terminates in the stomach.",
    ),
    "internal jugular line": (
        "A {side} internal jugular central venous catheter ends in the {tip}.",
        "{Side} IJ line tip is in the {tip}.",
        "{Side} internal jugular catheter terminates at the {tip}.",
        "{Side} IJ central line with tip in the {tip}.",
    ),
    "subclavian line": (
        "A {side} subclavian central venous catheter ends in the {tip}.",
        "{Side} subclavian line tip is in the {tip}.",
        "{Side} subclavian catheter terminates at the {tip}.",
    ),
    "PICC": (
        "A {side} PICC ends in the {tip}.",
        "{Side} PICC tip is in the {tip}.",
        "{Side}-sided PICC line terminates at the {tip}.",
        "A {side} PICC is in place with its tip in the {tip}.",
    ),
    "chest tube": (
        "A {side} chest tube is in place.",
        "{Side}-sided chest tube is directed toward the apex.",
        "{Side} pleural drain is present.",
    ),
}
"""Sentences of FINDINGS by name of the finding, or by name and ``mild`` or ``bilateral``."""
SUMMARIES: dict[str, tuple[str, ...]] = {
    "effusion": ("{Size} {side} pleural effusion.", "{Side} pleural effusion, {size}."),
    "effusion bilateral": ("{Size} bilateral pleural effusions.", "Bilateral pleural effusions, {size}."),
    "pneumothorax": ("{Size} {side} pneumothorax.", "{Side} pneumothorax, {size}."),
    "consolidation": (
        "{Place} consolidation.",
        "{Place} pneumonia.",
        "{Size} consolidation in the {place}, likely pneumonia.",
        "Findings concerning for pneumonia in the {place}.",
    ),
    "edema": ("{Size} pulmonary edema.", "Findings consistent with {size} pulmonary edema."),
    "atelectasis": ("{Size} atelectasis at the {place}.", "Atelectasis in the {place}."),
    "nodule": (
        "{Place} nodule, {length}.  Chest CT is recommended.",
        "{length} nodule in the {place}.  Further evaluation with CT is suggested.",
        "Nodule in the {place}.",
    ),
    "cardiomegaly": ("{Size} cardiomegaly.", "{Size} enlargement of the cardiac silhouette."),
    "device": ("Lines and tubes as described above.", "Support devices in good position.", "{Device} in place."),
}

HEART_NORMAL = (
    "Heart size is normal.",
    "The heart is normal in size.",
    "The cardiac silhouette is within normal limits.",
    "Cardiomediastinal silhouette is unremarkable.",
    "The heart size is within normal limits.",
    "Cardiac size is normal.",
)

MEDIASTINUM_NORMAL = (
    "The mediastinal and hilar contours are normal.",
    "Mediastinal contours are unremarkable.",
    "The hila are unremarkable.",
    "Hilar contours are within normal limits.",
)

CLEAR = (
    "The lungs are clear.",
    "Lungs are clear.",
    "The lungs are clear bilaterally.",
    "Both lungs are clear.",
    "The lungs are well expanded and clear.",
)

OTHERWISE_CLEAR = ("The lungs are otherwise clear.", "Otherwise, the lungs are clear.")
AORTA = {
    "normal": (),
    "tortuous": ("The aorta is tortuous.", "Tortuous thoracic aorta.", "The thoracic aorta is unfolded and tortuous."),
    "calcified": (
        "Calcifications of the aortic arch are noted.",
        "The aortic knob is calcified.",
        "Atherosclerotic calcification of the aortic arch.",
    ),
}

INSPIRATION = {
    "low": ("Lung volumes are low.", "Low lung volumes.", "Inspiratory effort is poor.", "There are low lung volumes."),
    "normal": (),
    "deep": (
        "The lungs are hyperinflated.",
        "Hyperinflation with flattened diaphragms.",
        "Lung volumes are large with flattening of the diaphragms.",
    ),
}

ROTATION = (
    "The patient is rotated to the {side}.",
    "Patient rotation to the {side} limits evaluation.",
    "There is rotation to the {side}.",
    "{Side}ward patient rotation is noted.",
)

EXPOSURE = {
    "under": ("The film is underpenetrated.", "Evaluation is limited by underpenetration.", "Underexposed radiograph."),
    "normal": (),
    "over": ("The film is overpenetrated.", "The radiograph is overexposed.", "Overpenetrated technique."),
}

HABITUS = {
    "slim": (),
    "average": (),
    "large": ("Evaluation is limited by body habitus.", "Large body habitus.", "Body habitus limits the study."),
}

SCOLIOSIS = {
    "right": ("Dextroscoliosis of the thoracic spine.", "There is rightward curvature of the thoracic spine."),
    "left": ("Levoscoliosis of the thoracic spine.", "There is leftward curvature of the thoracic spine."),
}

FRACTURE = (
    "Healed {side} rib fractures.",
    "Old {side}-sided rib fractures are noted.",
    "Multiple chronic {side} rib deformities.",
)

RAISED_DOME = (
    "Elevation of the {side} hemidiaphragm.",
    "The {side} hemidiaphragm is elevated.",
    "{Side} hemidiaphragm is chronically elevated.",
)

STOMACH = ("Air-filled stomach below the left hemidiaphragm.", "The stomach is distended with air.")
LEADS = ("EKG leads overlie the chest.", "Overlying EKG leads.", "External monitoring leads project over the chest.")
NIPPLES = ("Nipple shadows project over both lung bases.", "Bilateral nipple shadows are noted.")
SKIN_FOLD = (
    "A skin fold projects over the {side} hemithorax.",
    "Linear density over the {side} chest is a skin fold.",
)

ABSENT = {
    "consolidation": ("focal consolidation", "consolidation", "focal airspace opacity"),
    "effusion": ("pleural effusion", "effusion", "pleural fluid"),
    "pneumothorax": ("pneumothorax",),
    "edema": ("pulmonary edema", "overt pulmonary edema"),
    "nodule": ("nodule or mass", "suspicious nodule"),
}
"""Phrases to deny a finding; atelectasis, heart size and devices are rarely denied."""
DENIALS = ("There is no {list}.", "No {list}.", "No evidence of {list}.", "No {list} is seen.", "No {list} identified.")
REMARKS = (
    "Osseous structures are unremarkable.",
    "No acute osseous abnormality.",
    "The upper abdomen is unremarkable.",
    "Visualized bones are intact.",
    "No free air below the diaphragm.",
    "Degenerative changes of the thoracic spine.",
    "The imaged soft tissues are unremarkable.",
    "No subdiaphragmatic free air.",
    "Surgical clips are not seen.",
    "The trachea is midline.",
    "Mild degenerative changes of the shoulders.",
)

NORMAL_SUMMARY = (
    "No acute cardiopulmonary process.",
    "No acute cardiopulmonary abnormality.",
    "No acute intrathoracic process.",
    "Normal chest radiograph.",
    "No evidence of acute disease.",
    "No radiographic evidence of acute cardiopulmonary disease.",
)

QUIET_SUMMARY = NORMAL_SUMMARY[:3]
"""Impressions of studies whose only findings are devices."""
STOCK_NORMAL = (
    ("Lungs are clear.  The heart size is normal.  No pleural effusion or pneumothorax.", "Normal chest radiograph."),
    (
        "The lungs are clear without focal consolidation.  No pleural effusion or pneumothorax is seen.  "
        "The cardiac and mediastinal silhouettes are unremarkable.",
        "No acute cardiopulmonary process.",
    ),
    (
        "Heart size is normal.  The mediastinal and hilar contours are normal.  Lungs are clear.  "
        "No pleural effusion or pneumothorax is present.  No acute osseous abnormalities.",
        "No acute cardiopulmonary abnormality.",
    ),
    (
        "There is no focal consolidation, effusion, or pneumothorax.  The cardiomediastinal silhouette is normal.  "
        "Imaged osseous structures are intact.",
        "No acute intrathoracic process.",
    ),
    ("Cardiomediastinal contours are normal.  The lungs are clear.  There is no pneumothorax or pleural effusion.", ""),
    ("", "No acute cardiopulmonary process."),
    ("", "Normal chest radiograph."),
)
"""Identical reports that many normal films get."""
INDICATIONS = (
    "with cough", "with dyspnea", "with chest pain", "with fever", "with shortness of breath", "status post fall",
    "with altered mental status", "with hypoxia", "with weakness", "for preoperative evaluation", "with leukocytosis",
    "with syncope", "with wheezing", "// evaluate for pneumonia", "// line placement", "with ___ // ?infiltrate",
)  # fmt: skip

CHANGES = {
    "new": ("This is new since ___.", "New from the prior study.", "This was not present on ___."),
    "worse": ("This has increased since ___.", "Increased from the prior study.", "Worse compared to ___."),
    "better": ("This has decreased since ___.", "Decreased from the prior study.", "Improved compared to ___."),
    "same": ("This is unchanged.", "Unchanged from the prior study.", "Stable compared to ___."),
}

LENGTH = {
    10: ("1 cm", "10 mm"),
    12: ("1.2 cm", "12 mm"),
    15: ("1.5 cm", "15 mm"),
    18: ("1.8 cm", "18 mm"),
    20: ("2 cm", "20 mm"),
    25: ("2.5 cm", "25 mm"),
    30: ("3 cm", "30 mm"),
    40: ("4 cm",),
    50: ("5 cm",),
    60: ("6 cm",),
}
"""Texts of the possible lengths, by millimeters; few of them, so that numbers do not identify a report."""


def locations(finding: Finding) -> tuple[str, ...]:
    """Names of the location of a finding; empty if it has no zone."""
    if not finding.zone:
        return ("",)
    if finding.name == "atelectasis" and finding.zone == "lower":
        return BASE[finding.side]
    return PLACE[finding.side, finding.zone]


def sentences(finding: Finding) -> tuple[str, ...]:
    """The wordings of one finding for FINDINGS."""
    name = finding.kind or finding.name
    if finding.name == "effusion" and finding.side == "bilateral":
        return SENTENCES["effusion bilateral"]
    if finding.name == "effusion" and finding.severity == "mild":
        return SENTENCES["effusion"] + SENTENCES["effusion mild"]
    return SENTENCES[name]


def summaries(finding: Finding) -> tuple[str, ...]:
    """The wordings of one finding for IMPRESSION."""
    both = finding.name == "effusion" and finding.side == "bilateral"
    return SUMMARIES["effusion bilateral" if both else finding.name]
