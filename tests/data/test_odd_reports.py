"""Reports with escapes of the programs that exported them, and with misspelt section headers."""

import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cmcgns.data.repairs import noted
from cmcgns.data.reports import OTHER_WORDS, SECTION_NAMES, SPELLINGS, parse_report, sections
from cmcgns.data.text import decode_text, unescaped
from cmcgns.phantom import PhantomCorpus
from cmcgns.phantom.canvas import Draws
from cmcgns.phantom.writers import report_file

FINDINGS, IMPRESSION = "The lungs are clear.\nHeart size is normal.", "No acute disease."
PLAIN = f"FINDINGS:\n{FINDINGS}\n\nIMPRESSION:\n{IMPRESSION}"
MEANT = {"findings": FINDINGS, "impression": IMPRESSION}


def joined(ends: str) -> str:
    return PLAIN.replace("\n", ends)


@pytest.mark.parametrize(
    "written",
    [
        joined("_x000D_\n"),
        joined("_x000d_"),
        joined("_x000D__x000A_"),
        joined("\\n"),
        joined("\\r\\n"),
        joined("\\\\n"),
        joined("<br>"),
        joined("<br/>\n"),
        joined("<BR />"),
        joined("&#13;&#10;"),
        joined("&#xD;\n"),
        joined("&lt;br&gt;"),
        joined("\\.br\\"),
        joined("\\.sp\\"),
        joined("\\X0D0A\\"),
        joined("\\X0D\\\\X0A\\"),
        joined("~"),
        joined("\x0b"),
        joined("\u2028"),
        joined("\x85"),
        f"<div><p>FINDINGS:<br>{FINDINGS}</p><p><b>IMPRESSION:</b><br>{IMPRESSION}</p></div>",
        "\ufeff" + PLAIN,
        PLAIN.replace(" ", "\xa0"),
        PLAIN.replace("normal", "nor\xadmal").replace("lungs", "lu\u200bngs"),
        PLAIN.replace("FINDINGS", "ﬁndings"),
    ],
    ids=ascii,
)
def test_line_ends_and_headers_survive_every_export(written: str) -> None:
    assert {name: text.split() for name, text in sections(written).items()} == {
        name: text.split() for name, text in MEANT.items()
    }
    assert parse_report(written) == parse_report(PLAIN)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("size &lt; 5 cm &amp; &gt; 3 cm", "size < 5 cm & > 3 cm"),
        ("size &amp;lt; 5 cm", "size < 5 cm"),
        ("5&nbsp;mm nodule", "5 mm nodule"),
        ("patient&#39;s &quot;old&quot; clip", 'patient\'s "old" clip'),
        ("&eacute;panchement", "épanchement"),
        ("heart \\T\\ lungs \\F\\ bones \\S\\ \\R\\ \\E\\", "heart & lungs | bones ^ ~ \\"),
        ("\\H\\Effusion\\N\\ is new", "Effusion is new"),
        ("100 _x005F_ 5", "100 _ 5"),
        ("Ã©panchement Ã\xa0 gauche", "épanchement à gauche"),
        ("Itâ€™s normal", "It’s normal"),
        ("<b>No</b> <span style='x'>effusion</span>", "No effusion"),
    ],
)
def test_escapes_become_what_they_stand_for(written: str, meant: str) -> None:
    assert unescaped(written) == meant


@pytest.mark.parametrize(
    "text",
    [
        "left\\right lung, apical\\nodular scar",
        "heart < 15 cm and > 12 cm",
        "AT&T; R&D; A & B",
        "x_y and __ and _x and _xyz_",
        "~5 mm nodule, ~3 cm",
        "<clear> and <5 mm>",
        "Épanchement à gauche, Größe normal, cœur",
        "tube at C:\\temp",
        "Ratio is 3/4; ___ cm, XXXX-year-old",
        "ÃO, CORAÇÃO NORMAL",
    ],
)
def test_text_that_only_looks_like_an_escape_stays(text: str) -> None:
    with noted() as notes:
        assert unescaped(text) == text
    assert not notes


def test_accents_are_one_letter_each() -> None:
    text = "Épanchement pleural à gauche. Überblähung der Lunge."
    apart = unicodedata.normalize("NFD", text)
    assert parse_report(apart) == parse_report(text)
    assert parse_report(text).sentences == ["épanchement pleural à gauche", "überblähung der lunge"]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"]
)
def test_files_in_any_encoding(encoding: str) -> None:
    assert decode_text(f"{PLAIN}\nÉpanchement.".encode(encoding)) == f"{PLAIN}\nÉpanchement."


def test_rules_are_noted() -> None:
    with noted() as notes:
        unescaped(joined("_x000D_\n"))
        unescaped(joined("<br>"))
        parse_report(PLAIN.replace("IMPRESSION", "IMPRESSON"))
    assert dict(notes) == {"Excel escapes (_x000D_)": 1, "HTML tags and entities": 1, "misspelt section headers": 1}


# Headers

# as MIMIC-CXR's archive has them: MIT-LCP's section_parser.py names each with its count
OF_MIMIC = {
    "impression": "impresson imprression imoression impressoin imprssion impresion imperssion mpression impession",
    "findings": "finding findins findindgs findgings findngs findnings finidngs",
    "indication": "idication ndication",
    "comparison": "comparision comparsion comparrison comparisions",
}
OURS = {
    "impression": "inpression impresssion impressiom imprsssion ipmression impreession impressin impressionn imrpession",
    "findings": "findigns fidnings fnidings findinfs findingss indings finsings findinds",
    "conclusion": "conclsuion conclusoin",
    "technique": "techinque tecnique",
    "history": "histroy",
}


@pytest.mark.parametrize("style", [str.upper, str.capitalize, str.lower])
@pytest.mark.parametrize(
    ("name", "spelling"),
    [(name, each) for known in (OF_MIMIC, OURS) for name, words in known.items() for each in words.split()],
)
def test_a_misspelt_header_starts_its_section(name: str, spelling: str, style: type[str]) -> None:
    known = "impression" if name == "conclusion" else name
    others = {"FINDINGS": "The heart is large.", "IMPRESSION": "Right pneumonia."}
    others.pop(known.upper(), None)
    text = "\n \n ".join([" FINAL REPORT", *(f"{each}:  {body}" for each, body in others.items())])
    found = sections(f"{text}\n \n {style(spelling)}:  Words of this section.\n")
    assert found[known] == "Words of this section."
    assert {each.lower() for each in others} <= set(found)


@pytest.mark.parametrize(
    "text",
    [
        "FINDINGS: The lungs are clear. IMPRESSON: No acute disease.",
        "FINDINGS; The lungs are clear.\nIMPRESSION; No acute disease.",
        "FINDINGS\nThe lungs are clear.\nIMPRESSION\nNo acute disease.",
        "FINDINGS -\nThe lungs are clear.\nIMPRESSON.\nNo acute disease.",
        "FINDINGS:\nThe lungs are clear.\nFINAL IMPRESSOIN:\nNo acute disease.",
        "Findings : The lungs are clear.\nImpresion : No acute disease.",
        "\xa0FINDINGS:\xa0The lungs are clear.\n\xa0IMPRESSION:\xa0No acute disease.",
    ],
)
def test_headers_in_every_place_and_with_every_sign(text: str) -> None:
    assert sections(text) == {"findings": "The lungs are clear.", "impression": "No acute disease."}


@pytest.mark.parametrize("word", [*sorted(OTHER_WORDS), "contusion", "confusion", "impressive"])
def test_other_words_before_a_colon_start_no_section(word: str) -> None:
    text = f" FINDINGS:\n The lungs are clear.\n {word.capitalize()}: as before.\n IMPRESSION: Normal chest."
    assert set(sections(text)) == {"findings", "impression"}
    assert f"{word.capitalize()}: as before." in sections(text)["findings"]


def test_no_word_of_the_reports_becomes_a_header(realdata: Path) -> None:
    """Each word of 120 real and 300 generated reports, as a line of its own with a colon: none is taken for a header unless it is
    one."""
    texts = [
        "".join(ElementTree.parse(path).getroot().itertext()) for path in (realdata / "reports_openi").glob("*.xml")
    ]
    corpus = PhantomCorpus(300, seed=3)
    texts += [report_file(corpus.study(number).report, Draws(number)) for number in range(300)]
    words = {word.strip(".,:;()").lower() for text in texts for word in text.split()}
    known = {word for name in (*SECTION_NAMES, *SPELLINGS) for word in name.split()}
    assert len(words) > 1000
    for word in {word for word in words if word.isalpha()} - known:
        found = sections(f"FINDINGS: The lungs are clear.\n{word}: as before.")
        assert set(found) == {"findings"}, word
