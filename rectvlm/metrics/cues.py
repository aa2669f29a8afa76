"""The words that turn a finding's name into a statement: negation, doubt, the past, and where their reach ends.

The second half of the labeler's table (`rectvlm.metrics.terms` is the first). Every pattern is matched in lower case.
After NegEx (Chapman et al. 2001): a cue before a name reaches forward, one after it reaches back, neither beyond its
clause.
"""

import re

_SEEN = (
    r"(?:observed|detected|seen|present|identified|found|noted|evident|visible|visuali[sz]ed|demonstrated|appreciated|"
    r"encountered|monitored|distinguished|noticed|revealed|determined|recogni[sz]ed|shown|available|remarkable|"
    r"selected)"
)
_EARLIER = (
    r"(?:previous|prior|old|earlier|former|last|preceding)(?: [\w-]+){0,2} "
    r"(?:examinations?|cts?|stud(?:y|ies)|exams?|scans?|tomograph\w+|imaging|reports?|reviews?)"
)

NO_NEGATION = re.compile(
    r"\b(?:no|without(?: any)?|not(?: any)?) (?:(?:significant|interval|obvious|appreciable|relevant|marked|"
    r"definite) )*"
    r"(?:changes?|changed|differences?|increases?|increased|decreases?|growth|progression|regression|regressed)\b"
    r"(?: (?:was|were|is|are|has been) (?:not )?"
    + _SEEN
    + r"| in (?:the )?(?:size|number|dimensions?|appearance|extent))*"
    r"|\bnot only\b|\bno doubt\b"
    r"|\b(?:has|have|had)(?: \w+ly)? not (?:\w+ly )?(?:resolved|regressed|changed|disappeared|cleared|progressed)\b"
    r"|\bnot (?:\w+ly )?(?:resolved|changed)\b"
    rf"|\bnot (?:been )?{_SEEN}(?: (?:in|on|at))?(?: (?:the|his|her))? {_EARLIER}"
    rf"|\bnot (?:previously|earlier) {_SEEN}|\bnot {_SEEN} (?:previously|earlier|before)\b"
    r"|\bno longer than\b"
)
"""Looks like a negation and is none: nothing changed, or it was not there before."""

NOTHING_SAID = re.compile(
    r"\b(?:cannot|can not|could not|couldn't|can't|not)(?: be)?(?: \w+ly)? (?:evaluated|assessed|evaluable|assessable|"
    r"examined)\b"
    r"|\b(?:limit\w+|insufficient|suboptimal)(?: for)?(?: the)? (?:evaluation|assessment)\b"
    r"|\bno(?:t)? (?:new|newly)\b"
)
"""What the clause names was not judged: neither there nor absent. ("No new nodule" leaves the old ones open.)"""

NEGATION_BEFORE = re.compile(
    r"\b(?:no|without|neither|nor|absence of|absent|lack of|free (?:of|from)|negative for|devoid of|clear of|"
    r"non?e of the|"
    r"rather than|no evidence of|never|no longer|not|exclud(?:es?|ed|ing)|denies)\b"
)
"""Reaches forward."""
RESOLVED_BEFORE = re.compile(
    r"\b(?:resolved|(?:complete(?:ly)? )?resol(?:ution|ving completely)(?: of)?|disappearance of|clearing of|cleared)\b"
)
"""Reaches forward to the next "with": "resolution of the effusion with residual thickening"."""
NEGATION_AFTER = re.compile(
    rf"\b(?:not(?: \w+ly)?(?: been| be)?(?: \w+ly)? {_SEEN}|no longer(?: be)? {_SEEN}|"
    r"(?:has|have|had)(?: been)?(?: now)?(?: \w+ly)? (?:resolved|disappeared|cleared|vanished|regressed completely)|"
    r"(?:completely|totally) (?:resolved|disappeared|regressed|cleared)|"
    r"(?:is|are|was|were) (?:now )?(?:absent|negative|excluded|ruled out|resolved)|not (?:present|any)|absent|"
    r"(?:at|in|within) (?:the )?physiologic\w* (?:limits?|levels?|range|amounts?|quantit\w+))\b"
)
"""Reaches back."""
NEGATION_RIGHT_AFTER = re.compile(rf"\s*:\s*(?:(?:none|no|nil|absent|negative)\s*(?:[.,;]|$)|not {_SEEN})")
"""As in a form: "Effusion: none". It reaches back over a list that has no `STATED`."""
STATED = re.compile(
    r"[;.()?]|\b(?:an?|there|in|at|on|with|from|no|not|without|mild|minimal|small|moderate|severe|subtle|linear|stable|"
    r"unchanged|residual|is|are|was|were|has|have|shows?|\d+)\b"
)
"""Makes a statement of what stands before a form's colon: "small effusion, nodule: none"."""
NEGATION_WITHIN = re.compile(
    r"\b(?:not|no longer|without|non-?|less than|smaller than|below|"
    r"(?:normal|upper limits? of normal))(?:\b|(?=patholog))"
)
"""Denies the name that it stands in: "lymph nodes that do not reach pathological size"."""

DOUBT_BEFORE = re.compile(
    r"\b(?:possibl[ey]|probabl[ey]|likely|suspected|suspicious (?:for|of|in terms of)|suspicion of|suspect|"
    r"questionable|"
    r"equivocal|(?:may|might|could)(?: also)? (?:be|represent|reflect|indicate|suggest|correspond|"
    r"belong)\b(?! evaluated)|"
    r"suggest(?:s|ing|ive)?(?: of)?|concerning for|worrisome for|(?:cannot|can not|could not) (?:exclude|rule out)|"
    r"difficult to exclude|either|versus|vs\.?|differential(?: diagnosis)?(?: includes?)?|query|rule out|raises?|"
    r"in terms of)"
    r"(?=\W|$)"
)
"""Reaches forward."""
DOUBT_AFTER = re.compile(
    r"\b(?:(?:cannot|can not|could not|can't|not)(?: be)?(?: \w+ly)? (?:excluded|ruled out|differentiated|"
    r"distinguished from)|"
    rf"(?:versus|vs\.?)(?= )(?! (?:the )?{_EARLIER})|"
    r"(?:is|are|was|were) (?:suspected|possible|questionable|probable|equivocal|doubtful)|"
    r"(?:may|might) be (?:present|considered))(?=\W|$)"
)
"""Reaches back."""

HISTORY_BEFORE = re.compile(
    r"\b(?:history of|h/o|known case of|previously (?:diagnosed|known|treated)|was (?:treated|operated) for|"
    r"clinical(?:ly)? (?:suspicion|question) of)\b"
)
"""What follows, to the end of the clause, is the patient's past."""
PAST = re.compile(
    rf"\b(?:in|on|at|by) (?:the |his |her |a )?{_EARLIER}\b|\bpreviously (?:observed|seen|described|detected)\b"
)
PRESENT_TIME = re.compile(
    r"\b(?:stable|unchanged|no change|persist\w*|continu\w*|still|again|current\w*|now|increas\w*|decreas\w*|"
    r"regress\w*|"
    r"progress\w*|new|newly|resolved|disappear\w*|compar\w*|remain\w*|cleared|enlarg\w+|similar|same|not|no)\b"
)
"""A clause that speaks of an earlier examination and has none of these says nothing of today."""

CLAUSE_END = re.compile(
    r"[;:]|\.\s|\s(?:-|–|—)\s|\b(?:but|however|although|though|whereas|while|except(?: for)?|apart from(?: this|"
    r" these)?|"
    r"other than(?: this| these)?|with the exception of|nevertheless|yet|besides|otherwise|despite|in spite of|because|"
    r"in addition to|aside from)\b"
)
OPENER = re.compile(r"(?:,|\band\b|\bor\b|,\s*(?:and|or))\s*(?=(?:there (?:is|are|was|were)|no|without|neither)\b)")
"""Begins a clause of its own wherever it stands."""
DELIMITER = re.compile(r",(?:\s*(?:and|or)\b)?|\band\b|\bor\b")
FRONTED = re.compile(r"[\s,]*(?:(?:and|or)\s+)?(?:without|with no|in the absence of)\b")
"""At the head of a clause; its reach ends before the subject: "without effusion, consolidation is seen"."""
VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|shows?|showed|appears?|remains?|measures?|persists?|continues?|contains?|"
    r"demonstrates?|reveals?|attracts?|draws?)\b"
)
ACCOMPANIED = re.compile(
    r"(?:,|\band|\bor|\bwith)+\s*(?:accompan\w+|together|includ\w+|consistent|compatible|with|in favou?r)"
)
"""What follows such a comma still belongs to the verb before it."""
FRESH_START = re.compile(
    r",(?:\s*and)?\s+(?=(?:a|an|the|\d+(?:[.,]\d+)?(?:\s*x\s*\d+(?:[.,]\d+)?)?\s*[cm]m|mild|minimal|small|moderate|"
    r"subtle|linear|"
    r"stable|unchanged|residual|there)\b)|\band\s+(?=(?:a|an|there|\d+(?:[.,]\d+)?\s*[cm]m)\b)|\b(?:,|and)\s*with\b"
)
"""Where a cue's forward reach ends inside its clause: "no effusion, small nodule in the lingula"."""
PLACE = re.compile(
    r"\b(?:in|of|at) (?:the )?(?:left|right|both|middle|upper|lower|lingula)\b[^,]*,(?:\s*and)?\s+(?=[\w-]+ [\w-]+ \w+)"
)
"""A name with its own place is no part of the list after it: "nodule in the left apex, effusion and … are not seen"."""
WITH = re.compile(r"\bwith\b")
NOT_ADJECTIVAL = re.compile(
    r"[,;:.()]|\b(?:and|or|in|at|on|of|to|with|from|is|are|was|were|has|have|the|by|for|there)\b"
)
"""Between a side or a measure and a name: the side or measure is no adjective of it."""
QUESTIONED = re.compile(r"^[\w\s-]{0,12}\?")
"""A question mark right after a name: "(atelectasis?)"."""

SKIPPED_SECTION = (
    r"clinical (?:information|history|data|indication|question)|history|indications?|"
    r"reason(?: for (?:the )?(?:exam\w*|study))?|"
    r"comparisons?|techniques?|protocol|procedure|examination|exam"
)
READ_SECTION = r"findings?|impressions?|conclusions?|results?|opinion|summary|diagnosis"
HEADING = re.compile(rf"(?:^|(?<=[.!?\n])[ \t]*)[*#_ \t]*\b({SKIPPED_SECTION}|{READ_SECTION})\b[*_ \t]*:[*_ \t]*", re.M)
SENTENCE_END = re.compile(
    r"(?<!\bapprox)(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bno)(?<!\bdr)(?<!\bmax)(?<!\bmin)(?<!\bca)(?<!\bfig)[.!]+(?=\s|"
    r"$)"
    r"|\?(?=\s+[a-z0-9]|\s*$)|\n+"
)
MEASURE = re.compile(
    r"(\d+(?:[.,]\d+)?)(?:\s*[x×*]\s*(\d+(?:[.,]\d+)?))?(?:\s*[x×*]\s*\d+(?:[.,]\d+)?)?\s*-?\s*(mm|cm|millimet\w+|"
    r"centimet\w+)"
)
BELOW = re.compile(
    r"(?:less|smaller|shorter|lower) than|below|under|not exceed\w*|<\s*$|sub-?centimet\w+|millimet(?:ric|er-sized)|"
    r"small|shotty"
)
