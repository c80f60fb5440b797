"""The phantom's sentences match the findings of its films."""

from cmcgns.data.reports import parse_report
from cmcgns.errors import BadRow
from cmcgns.evaluate.sentence_truth import SentenceTruth, sentence_truth
from cmcgns.phantom import PhantomCorpus

STUDIES = 400


def test_what_a_sentence_is_read_as_holds_for_its_study():
    corpus, read, unread = PhantomCorpus(STUDIES, seed=3), 0, 0
    for i in range(STUDIES):
        study = corpus.study(i)
        sides = {name: {f.side for f in study.findings if f.name == name} for name in study.labels}
        try:
            sentences = parse_report(study.report).sentences
        except BadRow:
            continue
        for sentence in sentences:
            truth = sentence_truth(sentence)
            if truth is None:
                unread += 1
                continue
            read += 1
            for finding in truth.finding.split("+"):
                assert bool(study.labels[finding]) != truth.negated, (sentence, truth)
                assert truth.negated or not truth.laterality or truth.laterality in sides[finding], (sentence, truth)
    assert read > 1.8 * unread > 0  # the rest is about the technique, the skeleton, or nothing


def test_finding_side_and_denial_are_told_apart():
    assert sentence_truth("small left pleural effusion") == SentenceTruth("effusion", "left", False)
    assert sentence_truth("there are large bilateral pleural effusions") == ("effusion", "bilateral", False)
    assert sentence_truth("no pleural effusion or pneumothorax is seen") == ("effusion+pneumothorax", "", True)
    assert sentence_truth("mild linear atelectasis in both lung bases") == ("atelectasis", "bilateral", False)
    assert sentence_truth("a nasogastric tube passes below the left hemidiaphragm") == ("device", "", False)
    assert sentence_truth("left sided pacemaker with leads in the right heart") == ("device", "left", False)
    assert sentence_truth("an ill defined airspace opacity is present in the right lower lobe concerning for pneumonia") == (
        "consolidation", "right", False,
    )  # fmt: skip
    assert sentence_truth("the heart is severely enlarged") == ("cardiomegaly", "", False)
    assert sentence_truth("the cardiac silhouette is within normal limits") == ("cardiomegaly", "", True)
    assert sentence_truth("no acute osseous abnormality") is None
    assert sentence_truth("chest ct is recommended") is None
