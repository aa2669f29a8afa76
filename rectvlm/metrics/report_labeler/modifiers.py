"""Modifiers: words that turn a finding's name into a statement, and the ends of their scope.

They state negation, uncertainty and time. This is the second half of the labeler's table
(`finding_terms` is the first). Every pattern is matched in lower case. After NegEx (Chapman et al.
2001): the scope of a modifier before a name extends forward, that of one after it back, neither
beyond its clause.
"""

import re

_SEEN_VERBS = (
    r"(?:observed|detected|seen|present|identified|found|noted|evident|visible|visuali[sz]ed|"
    r"demonstrated|appreciated|"
    r"encountered|monitored|distinguished|noticed|revealed|determined|recogni[sz]ed|shown|"
    r"available|remarkable|"
    r"selected)"
)
_PRIOR_EXAMINATION_NAME = (
    r"(?:previous|prior|old|earlier|former|last|preceding)(?: [\w-]+){0,2} "
    r"(?:examinations?|cts?|stud(?:y|ies)|exams?|scans?|tomograph\w+|imaging|reports?|reviews?)"
)

_EXTENT_WORDS = (
    r"(?:significant|interval|obvious|appreciable|relevant|marked|definite|major|"
    r"considerable|substantial|notable|"
    r"noticeable|evident|clear|apparent|further|additional|dimensional|size|numerical|number|"
    r"volume)"
)
_OF_A_LESION = (
    r"(?= (?:of|in) (?:[\w-]+ ){0,4}?(?:nodul|mass|lesion|effusion|consolidat|opacit|"
    r"\w*adenopath))"
)
"""After "enlargement": of the heart or of a lymph node it is a finding, and its denial is one."""
_NOT_OF_NORMAL = (
    r"(?!(?: (?:in|of|the|lung|parenchymal?|bronchial|peribronchial|inter-?lobular|septal|"
    r"wall)){0,5} "
    r"(?:densit|thick|heart|cardi))"
)
"""After "increase": "no increase in density" denies an opacity, not a change of one."""
_NOT_A_SIGN = r"(?! (?:consistent|compatible|suggest\w+|indicat\w+|in favou?r)\b)"
"""After "changes": changes "consistent with emphysema" are the finding."""
_CHANGE_WORDS = (
    rf"(?:changes?{_NOT_A_SIGN}|changed|differences?|alterations?|variations?|decreases?|"
    rf"reduction|growth|progress(?:ion)?|regression|"
    r"regressed|improvement|worsening|deterioration|resolution|shrinkage|"
    rf"enlargement{_OF_A_LESION}|(?:increased?|increases){_NOT_OF_NORMAL})\b"
)
_OF_WHAT = (
    r"(?: (?:in|of|in terms of)"
    r"(?: (?:the|its|their|sizes?|numbers?|dimensions?|appearance|extent|volume|"
    r"amount)(?: (?:and|or))?){1,4}\b)"
)
_RESOLVED = (
    r"(?:resol(?:ved|ution|ving)|regress(?:ed|ion)|disappear(?:ed|ance)|clear(?:ed|ing)|vanished)"
)

PSEUDO_NEGATION = re.compile(
    r"\b(?:no|without(?: any)?|not(?: any)?|not show(?: any)?) "
    rf"(?:(?:{_EXTENT_WORDS}|complete|and|or|evidence of|signs? of) )*{_CHANGE_WORDS}"
    rf"(?: (?:was|were|is|are|has been) (?:not )?{_SEEN_VERBS}|{_OF_WHAT})*"
    rf"|(?:^(?:an? )?|\b{_EXTENT_WORDS} )(?:(?:{_EXTENT_WORDS}|and|"
    rf"or) )*{_CHANGE_WORDS}{_OF_WHAT}*"
    rf" (?:(?:was|were|is|are) not|(?:has|have) not been) (?:\w+ly )?{_SEEN_VERBS}"
    r"|\b(?:partial(?:ly)?|partly|incomplete(?:ly)?|(?:near(?:ly)?|almost)[ -](?:complete|"
    r"total|full)(?:ly)?|mostly|"
    r"largely|mainly|nearly|almost|(?:significant|substantial|marked|considerable|slight|"
    r"minimal|mild)(?:ly)?|some)"
    rf"(?: interval| been)* {_RESOLVED}(?: of)?\b"
    rf"|\b{_RESOLVED} (?:partial(?:ly)?|partly|in part|incompletely|mostly|largely|"
    r"to a (?:large|great|significant|certain) (?:extent|degree)|for the most part)\b"
    r"|\bnot only\b|\bno doubt\b"
    r"|\b(?:has|have|had)(?: \w+ly)? not (?:yet |been |\w+ly )*(?:resolved|regressed|changed|"
    r"disappeared|cleared|"
    r"progressed)\b"
    r"|\bnot (?:yet |been |\w+ly )*(?:resolved|changed)\b"
    rf"|\bnot (?:been )?{_SEEN_VERBS}(?: (?:in|on|at))?(?: (?:the|his|"
    rf"her))? {_PRIOR_EXAMINATION_NAME}"
    rf"|\bnot (?:previously|earlier) {_SEEN_VERBS}|\bnot {_SEEN_VERBS} (?:previously|earlier|"
    rf"before)\b"
    r"|\bno longer than\b"
)
"""NegEx's pseudo-negation: nothing changed, it resolved in part, or it was not there before."""
PARTIAL_SUBJECT_BEFORE = re.compile(
    r"(?:\b(?:some|(?:most|many|part|parts|half|several|one|almost all) of)(?: the)?"
    rf"|(?:^(?:an? )?|\b{_EXTENT_WORDS} )(?:(?:{_EXTENT_WORDS}|and|"
    rf"or) )*{_CHANGE_WORDS}{_OF_WHAT}? (?:in|of)(?: the)?)"
    r"(?: (?!(?:and|or|with)\b)[\w-]+){0,3} $"
)
"""Before a name: a negation after it denies a part or a change. "Some of the nodules resolved"."""

NOT_ASSESSED = re.compile(
    r"\b(?:cannot|can not|could not|couldn't|can't|not)(?: be)?(?: \w+ly)? (?:evaluated|"
    r"assessed|evaluable|assessable|"
    r"examined)\b"
    r"|\b(?:limit\w+|insufficient|suboptimal)(?: for)?(?: the)? (?:evaluation|assessment)\b"
)
"""Assessment was impossible: findings of the clause are neither there nor absent."""
NEW = re.compile(r"\bnew(?:ly)?\b")
"""Between a negation and a name, or before a name that is denied after it.

"No new nodule" leaves the old ones open."""

NEGATION_BEFORE = re.compile(
    r"\b(?:no|without|neither|nor|absence of|absent|lack of|free (?:of|from)|negative for|"
    r"devoid of|clear of|"
    r"non?e of the|"
    r"rather than|no evidence of|never|no longer|not|exclud(?:es?|ed|ing)|denies|"
    r"unlikely(?! (?:to be )?(?:malignan|metasta|neoplas)))\b"
)
"""Negation with a forward scope."""
RESOLVED_BEFORE = re.compile(
    r"\b(?:resolved|(?:complete(?:ly)? )?resol(?:ution|ving completely)(?: of)?|"
    r"disappearance of|clearing of|cleared)\b"
)
"""Forward scope up to the next "with": "resolution of the effusion with residual thickening"."""
NEGATION_AFTER = re.compile(
    rf"\b(?:not(?: \w+ly)?(?: been| be)?(?: \w+ly)? {_SEEN_VERBS}|"
    rf"no longer(?: be)? {_SEEN_VERBS}|"
    r"(?:has|have|had)(?: been)?(?: now)?(?: \w+ly)? (?:resolved|disappeared|cleared|"
    r"vanished|regressed completely)|"
    r"(?:completely|totally) (?:resolved|disappeared|regressed|cleared)|"
    r"(?:is|are|was|were) (?:now )?(?:absent|negative|excluded|ruled out|resolved)|"
    r"not (?:present|any)|absent|"
    r"(?:at|in|within|of) (?:the )?physiologic\w* (?:limits?|levels?|range|amounts?|quantit\w+))\b"
)
"""Negation with a back scope."""
NEGATION_RIGHT_AFTER = re.compile(
    rf"\s*:\s*(?:(?:none|no|nil|absent|negative)\s*(?:[.,;]|$)|not {_SEEN_VERBS})"
)
"""Negation in a form: "Effusion: none". Back scope over a list without `FORM_STATEMENT`."""
PAIRED_NEGATION_AFTER = re.compile(r"\s*[-–—/]\s*no (?:\w+ )?(?:effusions?|thick\w+)\b")
"""Right after one of the pair of effusion and thickening, whose one negation covers both.

Translated reports say "pleural effusion - no thickening is seen"."""
FORM_STATEMENT = re.compile(
    r"[;.()?]|\b(?:an?|there|in|at|on|with|from|no|not|without|mild|minimal|small|moderate|"
    r"severe|subtle|linear|stable|"
    r"unchanged|residual|is|are|was|were|has|have|shows?|\d+)\b"
)
"""Statement before a form's colon: "small effusion, nodule: none"."""
CHANGE_AFTER_NAME = re.compile(
    r" (?:(?:size|interval) )*(?:progression|growth|regression|worsening|improvement|"
    r"size changes?)\b"
)
"""Right after a name: the negation before it denies the change: "no evidence of nodule growth"."""
BARE_NEGATION_AFTER = re.compile(r"\b(?:unlikely\b(?! to\b)|resolved(?=\W*$|[.,;]))")
"""Back scope where no `BARE_NEGATION_END` is between.

An unlikely finding is absent, since an uncertain one is scored as present."""
BARE_NEGATION_END = re.compile(r"[,;:]|malignan|neoplas|metasta|cancer|infect")
"""Between a name and a bare negation: the negation is of something else.

"Nodules stable, effusion resolved", "a nodule for which cancer is unlikely"."""
REMOVED_AFTER = re.compile(
    r"(?: (?!(?:which|that|whose|where|after|secondary|due)\b)[\w-]+){0,8}? "
    r"(?:(?:has|have|had) been|was|were|is|are)(?: (?:now|since|\w+ly))? (?:removed|"
    r"explanted|withdrawn)\b"
    r"| (?:removed|explanted|withdrawn)\b"
)
"""Right after a device's name: it is no longer there.

"Gallbladder removed, clips are seen" leaves the clips."""
REMOVED_BEFORE = re.compile(
    r"\b(?:removal|explantation|withdrawal) of(?= (?:(?!(?:and|or|"
    r"with)\b)[\w-]+ ){0,4}(?:tubes?|catheters?|cannulas?|"
    r"lines?|drains?|leads?|wires?|pacemakers?|stents?|ports?|filters?|screws?|prosthe\w+|"
    r"devices?|implants?)\b)"
)
"""Removal, with a forward scope over a list of devices up to a comma."""
NEGATION_WITHIN = re.compile(
    r"\b(?:not|no longer|without|non-?|less than|smaller than|below|"
    r"(?:normal|upper limits? of normal))(?:\b|(?=patholog))"
)
"""Negation inside a name: "lymph nodes that do not reach pathological size"."""

UNCERTAINTY_BEFORE = re.compile(
    r"\b(?:possibl[ey]|probabl[ey]|likely|suspected|suspicious (?:for|of|in terms of)|"
    r"suspicion of|suspect|"
    r"questionable|"
    r"equivocal|(?:may|might|could)(?: also)? (?:be|represent|reflect|indicate|suggest|"
    r"correspond|"
    r"belong)\b(?! evaluated)|"
    r"suggest(?:s|ing|ive)?(?: of)?|concerning for|worrisome for|(?:cannot|can not|"
    r"could not) (?:exclude|rule out)|"
    r"difficult to exclude|either|versus|vs\.?|differential(?: diagnosis)?(?: includes?)?|"
    r"query|rule out|raises?|"
    r"in terms of)"
    r"(?=\W|$)"
)
"""Uncertainty with a forward scope."""
UNCERTAINTY_AFTER = re.compile(
    r"\b(?:(?:cannot|can not|could not|can't|not)(?: be)?(?: \w+ly)? (?:excluded|ruled out|"
    r"differentiated|"
    r"distinguished from)|"
    rf"(?:versus|vs\.?)(?= )(?! (?:the )?{_PRIOR_EXAMINATION_NAME})|"
    r"(?:is|are|was|were) (?:suspected|possible|questionable|probable|equivocal|doubtful)|"
    r"(?:may|might) be (?:present|considered))(?=\W|$)"
)
"""Uncertainty with a back scope."""

HISTORY_BEFORE = re.compile(
    r"\b(?:history of|h/o|known case of|previously (?:diagnosed|known|treated)|"
    r"was (?:treated|operated) for|"
    r"clinical(?:ly)? (?:suspicion|question) of)\b"
)
"""Before the patient's history, up to the end of the clause: the last comma before a verb."""
PRIOR_EXAMINATION = re.compile(
    rf"(?:\b(?:(?:is|are|was|were|(?:has|have|had) been) )?(?:also )?"
    rf"(?:{_SEEN_VERBS}|described|mentioned|reported|measured|defined) )?\b(?:in|on|at|"
    rf"by) (?:the |his |her |a )?{_PRIOR_EXAMINATION_NAME}\b"
    r"|\bpreviously (?:observed|seen|described|detected)\b"
)
PRIOR_EXAMINATION_ASIDE = re.compile(
    rf",\s*(?:which|that|also|already|not|\d+ ?mm|"
    rf"(?:known|described|mentioned|{_SEEN_VERBS})(?= (?:as|in|on|at|"
    rf"by)\b))\b[^,;:.]{{0,80}}?\b{_PRIOR_EXAMINATION_NAME}\b"
    r"(?: (?:dated|of|on|from|performed)\b[^,;:]{0,40})?,"
)
"""Aside between commas, after which the sentence goes on with its subject.

"The nodule, also seen in the previous CT, measures 6 mm"."""
CURRENT_EXAMINATION = re.compile(
    r"\b(?:stable|unchanged|no change|persist\w*|continu\w*|still|again|current\w*|now|"
    r"increas\w*|decreas\w*|"
    r"regress\w*|"
    r"progress\w*|new|newly|resolved|disappear\w*|compar\w*|remain\w*|cleared|enlarg\w+|"
    r"similar|same|not|no|"
    r"without(?: \w+)? change|(?:in|on) (?:this|the present|today's))\b"
)
"""Words of today. A clause on an earlier examination without one says nothing of today."""
PRESENT_TENSE = re.compile(r"\b(?:is|are|has|have|measures?|appears?|shows?|reaches)\b")
"""Words of today, unless the earlier examination heads the clause.

Translated reports tell the past in the present tense."""

CLAUSE_END = re.compile(
    r"[;:]|\.\s|\s(?:-|–|—)\s|\b(?:but|however|although|though|whereas|while|except(?: for)?|"
    r"apart from(?: this|"
    r" these)?|"
    r"other than(?: this| these)?|with the exception of|nevertheless|yet|besides|otherwise|"
    r"despite|in spite of|because|"
    r"in addition to|aside from)\b"
)
NEGATED_PAIR = re.compile(
    r"(?:^|(?<=[,;:.] ))"
    r"(?:(?!(?:in|of|at|on|with|is|are|was|were|has|have|there|an?|the|stable|small|mild|minimal|"
    r"moderate|large|no|not|without)\b)[a-z/-]+ ){1,4}(?:-|–|—) "
    r"(?:(?!(?:is|are|was|were|has|have|no|not|without|there)\b)[a-z/-]+ ){1,5}"
    rf"(?:(?:is|are|was|were|has been|have been) )?not (?:\w+ly )?{_SEEN_VERBS}"
)
"""Two things on either side of a dash that one negation covers.

"Pleural effusion - thickening was not observed": the dash stands for a slash, and no clause ends
there."""
CLAUSE_OPENER = re.compile(
    r"(?:,|\band\b|\bor\b|,\s*(?:and|or))\s*(?=(?:there (?:is|are|was|were)|no|without|"
    r"neither)\b)"
)
"""Words that begin a clause of their own."""
CLAUSE_DELIMITER = re.compile(r",(?:\s*(?:and|or)\b)?|\band\b|\bor\b")
FRONTED_NEGATION = re.compile(r"[\s,]*(?:(?:and|or)\s+)?(?:without|with no|in the absence of)\b")
"""Negation at the head of a clause, whose scope ends before the subject.

"Without effusion, consolidation is seen"."""
VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|shows?|showed|appears?|remains?|measures?|persists?|"
    r"continues?|contains?|"
    r"demonstrates?|reveals?|attracts?|draws?)\b"
)
ACCOMPANYING_PHRASE = re.compile(
    r"(?:,|\band|\bor|\bwith)+\s*(?:accompan\w+|together|includ\w+|consistent|compatible|"
    r"with|in favou?r)"
)
"""After a comma: a phrase that still belongs to the verb before it."""
FORWARD_SCOPE_END = re.compile(
    r",(?:\s*and)?\s+(?=(?:a|an|the|\d+(?:[.,]\d+)?(?:\s*x\s*\d+(?:[.,]\d+)?)?\s*[cm]m|mild|"
    r"minimal|small|moderate|"
    r"subtle|linear|"
    r"stable|unchanged|residual|multiple|several|numerous|scattered|there)\b)"
    r"|\band\s+(?=(?:a|an|there|\d+(?:[.,]\d+)?\s*[cm]m)\b)|\b(?:,|and)\s*with\b"
)
"""End of a forward scope inside a clause: "no effusion, small nodule in the lingula"."""
PHRASE_END = re.compile(
    r"(?:,\s+(?:(?:and|or)\b)?|\b(?:and|or)\b)(?!\s*(?:in )?(?:(?:the|both|left|"
    r"right) )*lungs?\b(?! nodul))"
    r"|\b(?:with|without)\b"
)
"""Word that separates one thing from another inside a clause: "fatty liver and opacities".

"Nodules in the liver and lungs" are in both."""
WITHOUT = re.compile(r"\bwithout\b")
VESSEL_LANDMARK = re.compile(
    r"\b(?:(?:adjacent|next|close|lateral|medial|anterior|posterior|inferior|superior) to|"
    r"neighbo\w+(?: to)?|"
    r"abutting|near|beside|around)(?: [\w-]+){0,2}? (?:aort\w*(?: arch)?|arch|coronar\w*)"
)
"""Vessel that only locates something else."""
LOCATION_BEFORE_LIST = re.compile(
    r"\b(?:in|of|at) (?:the )?(?:left|right|both|middle|upper|lower|"
    r"lingula)\b[^,]*,(?:\s*and)?\s+(?=[\w-]+ [\w-]+ \w+)"
)
"""Location of a name, which is then no part of the list after it.

"Nodule in the left apex, effusion and … are not seen"."""
WITH = re.compile(r"\bwith\b")
NOT_ADJECTIVAL = re.compile(
    r"[,;:.()]|\b(?:and|or|in|at|on|of|to|with|from|is|are|was|were|has|have|the|by|for|there)\b"
)
"""Between a side or a measurement and a name: the two do not belong together."""
QUESTION_MARK_AFTER = re.compile(r"^[\w\s-]{0,12}\?")
"""Question mark right after a name: "(atelectasis?)"."""

SKIPPED_SECTION = (
    r"clinical (?:information|history|data|indication|question)|history|indications?|"
    r"reason(?: for (?:the )?(?:exam\w*|study))?|"
    r"comparisons?|techniques?|protocol|procedure|examination|exam"
)
READ_SECTION = r"findings?|impressions?|conclusions?|results?|opinion|summary|diagnosis"
WRAPPED_LINE = re.compile(
    rf"(?<![.!?:;\s])[ \t]*\n[ \t]*(?!(?:{SKIPPED_SECTION}|{READ_SECTION})[*_ \t]*:)"
    r"(?=[a-z]|\d+(?:[.,]\d+)?(?:\s*x\s*\d+(?:[.,]\d+)?)?\s*[cm]m\b)"
)
"""Line break inside a sentence, in text with capitals.

A line break before a capital, a bullet or a heading ends the sentence."""
SECTION_HEADING = re.compile(
    rf"(?:^|(?<=[.!?\n])[ \t]*)[*#_ \t]*\b({SKIPPED_SECTION}|{READ_SECTION})\b[*_ \t]*:[*_ \t]*",
    re.M,
)
SENTENCE_END = re.compile(
    r"(?<!\bapprox)(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bno)(?<!\bdr)(?<!\bmax)(?<!\bmin)(?<!\bca)(?<!\bfig)[.!]+(?=\s|"
    r"$)"
    r"|\?(?=\s+[a-z0-9]|\s*$)|\n+"
)
MEASUREMENT = re.compile(
    r"(\d+(?:[.,]\d+)?)(?:\s*[x×*]\s*(\d+(?:[.,]\d+)?))?(?:\s*[x×*]\s*\d+(?:[.,]\d+)?)?\s*-?\s*(mm|cm|millimet\w+|"
    r"centimet\w+)"
)
BETWEEN_NODE_SIZES = re.compile(
    r"[^.;:]*(?:,|\band\b|\bor\b)\s*(?:(?:the|largest|other|another|one|second|up|to|"
    r"approximately|about|of|measuring|"
    r"reaching|measures)\s+)*$"
)
"""Between two measurements of lymph nodes.

"8 mm in the axilla and 14 mm in the hilum", not "and a cyst of 14 mm"."""
AFTER_NODE_SIZE = re.compile(
    r"\s*(?:$|[.,;:()]|(?:in|at|on)\b(?! (?:the |its )?(?:long|longest|largest)\b)|(?:and|or|"
    r"within|around|near|"
    r"short|is|are|was|were|diameter|size)\b)"
)
"""After the second measurement: not "and a 15 mm cyst", nor the long axis of the same node."""
BELOW_SIZE = re.compile(
    r"(?:less|smaller|shorter|lower) than|below|under|not exceed\w*|<\s*$|sub-?centimet\w+|"
    r"millimet(?:ric|er-sized)|"
    r"small|shotty"
)
