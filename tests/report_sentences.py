"""Sentences of chest-CT reports with the labels that a reader would give them.

All were written for this project.

`HELD_OUT` was written, and committed, before the labeler had a rule. One rule was changed after a
look at what the labeler says of it, "stent" in "consistent", and none since
(docs/concepts/report-metrics.md). `TUNING` is what the rules were made with. A gold label is a sign
and a code of `CODES`: `+` present, `?` uncertain, `-` stated to be absent; findings without one are
not mentioned. Consolidation is a kind of lung opacity, so a present or uncertain consolidation
implies the same of the opacity, here as in the labeler.
"""

from rectvlm.labels import FINDINGS

_CODES = "MM AWC CM PE CAC HH LAP EM AT LN LO FS PLE MA PT CO BR IS"
CODES = dict(zip(_CODES.split(" "), FINDINGS, strict=True))

HELD_OUT: tuple[tuple[str, str], ...] = (
    # In the manner of translated reports.
    ("Pericardial effusion and thickening were not detected.", "-PE"),
    (
        "Calcific atheroma plaques are observed in the walls of the aortic arch "
        "and the coronary arteries.",
        "+AWC +CAC",
    ),
    ("Heart contour and size are natural.", "-CM"),
    (
        "The heart is larger than normal and there is fluid reaching 14 mm "
        "between the pericardial leaves.",
        "+CM +PE",
    ),
    ("The cardiothoracic index has increased in favor of the heart.", "+CM"),
    (
        "No lymph node was detected in pathological size "
        "and appearance in the mediastinum and in both axillae.",
        "-LAP",
    ),
    ("In the mediastinum, lymph nodes with a short diameter of up to 7 mm are observed.", "-LAP"),
    ("A lymph node measuring 22x16 mm is observed in the right lower paratracheal area.", "+LAP"),
    ("Sliding type hiatal hernia is observed at the distal end of the esophagus.", "+HH"),
    (
        "When the lung parenchyma is examined, "
        "there are subsegmental atelectatic changes in the lingula "
        "and in the middle lobe.",
        "+AT",
    ),
    ("Several nonspecific nodules, the largest measuring 4 mm, are observed in both lungs.", "+LN"),
    ("Aeration of both lungs is normal; no mass, nodule or infiltration was observed.", "-LN -LO"),
    ("Pleuroparenchymal sequelae density increases are observed in both lung apices.", "+FS +LO"),
    (
        "Ground glass areas with interlobular septal thickening (crazy paving) "
        "are observed in both lungs.",
        "+LO +IS",
    ),
    (
        "There are patchy consolidations accompanied by ground glass densities "
        "in the right lower lobe.",
        "+CO +LO",
    ),
    ("Mosaic attenuation pattern is observed in both lungs (small airway disease?).", "+MA"),
    ("Peribronchial minimal thickness increases are observed in the central parts.", "+PT"),
    ("Mild cylindrical bronchiectatic enlargements are observed in the lower lobes.", "+BR"),
    ("No pericardial or pleural effusion was observed.", "-PE -PLE"),
    (
        "Bilateral pleural effusion was not observed, "
        "but there is minimal pleural thickening on the left.",
        "-PLE",
    ),
    (
        "There is free fluid in the left pleural space with a depth of 3 cm "
        "and adjacent compression atelectasis.",
        "+PLE +AT",
    ),
    ("Central venous catheter ending in the superior vena cava is observed.", "+MM"),
    (
        "Contrast material was not given, so mediastinal structures cannot be evaluated optimally.",
        "",
    ),
    ("Suture materials secondary to the bypass operation are observed in the sternum.", "+MM"),
    (
        "Paraseptal and centriacinar emphysematous changes are observed "
        "in the upper lobes of both lungs.",
        "+EM",
    ),
    ("Thoracic aorta diameter is normal.", ""),
    ("A hypodense nodule of 12 mm is observed in the left lobe of the thyroid gland.", ""),
    (
        "Degenerative changes are observed in the vertebrae, "
        "and there are sequelae of old fractures in the ribs.",
        "",
    ),
    ("Bilateral adrenal glands are normal, and no nodular lesion was detected in the liver.", ""),
    (
        "In the current examination, "
        "the previously observed left pleural effusion has completely disappeared.",
        "-PLE",
    ),
    ("The nodule observed in the previous examination in the right upper lobe is stable.", "+LN"),
    (
        "The consolidation area in the left lower lobe has regressed significantly "
        "but still continues.",
        "+CO",
    ),
    ("Linear fibroatelectatic changes are observed in the middle lobe.", "+FS +AT"),
    (
        "No significant interval change was observed in the size "
        "of the nodules described in the right lung.",
        "+LN",
    ),
    ("Findings suspicious for early fibrosis are observed in the basal parts of the lungs.", "?FS"),
    (
        "Nodular ground glass opacities are observed in the periphery of both lungs, "
        "in favor of viral pneumonia.",
        "+LO",
    ),
    ("Trachea and both main bronchi are open and no obstructive pathology was detected.", ""),
    ("Calcified lymph nodes are observed in the right hilum.", ""),
    ("Minimal effusion is observed in the right hemithorax.", "+PLE"),
    ("Costophrenic sinuses are open and pleural effusion was not detected.", "-PLE"),
    # In the manner of reports from English-speaking departments.
    ("The heart is normal in size without pericardial effusion.", "-CM -PE"),
    ("Heart size is at the upper limits of normal.", "-CM"),
    ("Mild cardiomegaly with a small pericardial effusion.", "+CM +PE"),
    ("No pneumothorax, pleural effusion, or focal consolidation.", "-PLE -CO"),
    ("There is no evidence of pleural effusion, pneumothorax or lymphadenopathy.", "-PLE -LAP"),
    ("Left chest wall ICD with leads in the right atrium and right ventricle.", "+MM"),
    ("Endotracheal tube terminates 4 cm above the carina.", "+MM"),
    ("Prosthetic aortic valve and median sternotomy wires are in place.", "+MM"),
    ("Moderate three-vessel coronary artery calcifications.", "+CAC"),
    ("Dense atherosclerotic calcification of the thoracic aorta without aneurysm.", "+AWC"),
    ("Aortic valve calcification is noted.", ""),
    ("Small hiatal hernia, unchanged.", "+HH"),
    ("No hiatal hernia.", "-HH"),
    (
        "Bulky mediastinal and right hilar lymphadenopathy, the largest node measuring 3.1 cm.",
        "+LAP",
    ),
    ("Scattered subcentimeter mediastinal lymph nodes, not enlarged by size criteria.", "-LAP"),
    ("Moderate centrilobular emphysema with an upper lobe predominance.", "+EM"),
    ("There is subcutaneous emphysema in the left chest wall.", ""),
    ("Dependent atelectasis bilaterally, otherwise the lungs are clear.", "+AT"),
    ("Solid 9 mm nodule in the left upper lobe, suspicious for malignancy.", "+LN"),
    ("No suspicious pulmonary nodules.", "-LN"),
    ("No new or enlarging nodules; the 5 mm nodule in the lingula is unchanged.", "+LN"),
    (
        "Patchy airspace opacities in the right middle lobe, "
        "which may represent atelectasis or early pneumonia.",
        "+LO ?AT",
    ),
    ("Biapical pleuroparenchymal scarring.", "+FS"),
    (
        "Subpleural reticulation with traction bronchiectasis and honeycombing, "
        "compatible with fibrosis.",
        "+BR +FS",
    ),
    ("Small right pleural effusion cannot be excluded.", "?PLE"),
    ("Trace left effusion with overlying atelectasis.", "+PLE +AT"),
    ("Mosaic perfusion, likely due to small airways disease.", "+MA"),
    ("Diffuse bronchial wall thickening with scattered mucus plugging.", "+PT"),
    (
        "Smooth interlobular septal thickening and bilateral effusions, "
        "consistent with pulmonary edema.",
        "+IS +PLE",
    ),
    ("No consolidation, but there is a subtle ground-glass opacity in the lingula.", "-CO +LO"),
    ("The lungs are free of consolidation or nodules.", "-CO -LN"),
    ("Bronchiectasis is absent.", "-BR"),
    ("Resolved right lower lobe consolidation with residual scarring.", "-CO +FS"),
    ("Possible mild bronchiectasis in the lower lobes.", "?BR"),
    ("Either atelectasis or consolidation in the left base.", "?AT ?CO"),
    ("Pleural effusions are no longer seen.", "-PLE"),
    ("The pleural spaces and pericardium are unremarkable.", "-PLE -PE"),
    ("Persistent consolidation in the right lower lobe despite treatment.", "+CO"),
    ("Apart from a calcified nodule in the right apex, the lungs are normal.", "+LN"),
    ("Multiple hepatic nodules and a splenic cyst.", ""),
    ("Right axillary lymph nodes are enlarged, up to 18 mm in short axis.", "+LAP"),
    ("Neither pleural effusion nor pericardial effusion is identified.", "-PLE -PE"),
    ("Consolidation is not present; emphysema is.", "-CO +EM"),
    # History, comparison, indication; sections.
    (
        "Indication: shortness of breath, rule out pleural effusion. "
        "Findings: The lungs are clear.",
        "-LO -CO -LN -AT",
    ),
    ("History of emphysema. No nodule is seen.", "-LN"),
    (
        "Comparison: CT of March, which showed a pericardial effusion.\n"
        "Findings: Pericardial effusion has resolved.",
        "-PE",
    ),
    (
        "Clinical information: known bronchiectasis.\n"
        "Findings: Mild bronchiectasis in the lingula.\nImpression: Bronchiectasis.",
        "+BR",
    ),
    ("In the previous examination there was a consolidation in the left lower lobe.", ""),
    (
        "Patient with a history of lymphoma; "
        "enlarged nodes in the left axilla measure up to 25 mm.",
        "+LAP",
    ),
    ("Follow-up of the nodule in the right upper lobe is recommended.", "+LN"),
    ("Findings: Heart size is normal. No effusion.\nImpression: Normal chest CT.", "-CM -PLE"),
)

TUNING: tuple[tuple[str, str], ...] = (
    ("Trachea and main bronchi are open; there is no obstructive pathology.", ""),
    ("Pericardial effusion-thickening was not detected.", "-PE"),
    ("Minimal fluid is observed in the pericardial space.", "+PE"),
    ("Pleural-pericardial effusion was not seen.", "-PLE -PE"),
    ("Mediastinal vascular structures, heart contour and size are normal.", "-CM"),
    ("Heart dimensions have increased.", "+CM"),
    ("The heart is not enlarged.", "-CM"),
    ("Cardiac size is within normal limits.", "-CM"),
    ("Heart size is increased, no pericardial effusion.", "+CM -PE"),
    ("The left atrium is dilated.", ""),
    (
        "Millimetric calcific plaques are observed in the aorta and in the left coronary arteries.",
        "+AWC +CAC",
    ),
    ("Atherosclerotic changes are observed in the thoracic aorta.", "+AWC"),
    ("No coronary artery calcification.", "-CAC"),
    ("Stent material is observed in the LAD.", "+MM"),
    ("Mitral annulus calcification is observed.", ""),
    ("Calcified pleural plaques on the diaphragm.", ""),
    ("Hiatal hernia was not observed, and esophageal wall thickness is normal.", "-HH"),
    ("A Bochdalek hernia containing fat is seen on the left.", ""),
    ("Lymph nodes with short axes not exceeding 8 mm are observed in the mediastinum.", "-LAP"),
    ("Lymph nodes that do not reach pathological dimensions are observed in the axillae.", "-LAP"),
    ("No lymphadenopathy in pathological size and appearance was detected.", "-LAP"),
    ("Lymph nodes in the subcarinal area, the largest 15 mm in short axis.", "+LAP"),
    ("Several lymph nodes are observed in the mediastinum.", ""),
    ("Enlarged mediastinal lymph nodes.", "+LAP"),
    (
        "There are emphysematous changes in both lungs and a 6 mm nodule in the right upper lobe.",
        "+EM +LN",
    ),
    ("Pneumomediastinum and mediastinal emphysema.", ""),
    ("Plate atelectasis is seen in both lower lobes.", "+AT"),
    (
        "No mass or nodule was observed in both lungs, "
        "linear atelectasis is present in the lingula.",
        "-LN +AT",
    ),
    ("Thyroid gland is heterogeneous with nodules.", ""),
    (
        "A nodule with a diameter of 7 mm in the right lung "
        "and a nodule in the liver are observed.",
        "+LN",
    ),
    ("No nodular or infiltrative lesion was detected in the lung parenchyma.", "-LN -LO"),
    ("No active infiltration was detected in either lung.", "-LO"),
    ("Peripheral ground-glass densities are observed, compatible with viral pneumonia.", "+LO"),
    ("Liver parenchymal density has decreased in line with steatosis.", ""),
    ("No consolidation, small ground-glass opacity in the right upper lobe.", "-CO +LO"),
    ("Sequela parenchymal bands are observed in the apex of both lungs.", "+FS"),
    ("Old fracture sequelae are observed in the left 6th rib.", ""),
    ("Sequelae calcific lymph nodes in the left hilum.", ""),
    ("Pleural effusion reaching 3 cm on the left, and 1 cm on the right, is observed.", "+PLE"),
    ("There is no pleural effusion on the right; a small effusion is seen on the left.", "+PLE"),
    ("Bilateral pleural effusion has decreased compared with the previous examination.", "+PLE"),
    ("The pleural effusion seen in the previous CT was not observed in this examination.", "-PLE"),
    (
        "Newly developed consolidation, not observed in the previous examination, "
        "is present in the lingula.",
        "+CO",
    ),
    (
        "Pleural effusion, pericardial effusion and lymphadenopathy were not observed.",
        "-PLE -PE -LAP",
    ),
    ("Mosaic attenuation is present in both lungs, pleural effusion was not observed.", "+MA -PLE"),
    ("There is increased bronchial wall thickness in the central airways.", "+PT"),
    ("Thickening of the bronchial walls is observed.", "+PT"),
    ("Bronchial walls are thickened in the lower lobes.", "+PT"),
    ("Esophageal wall thickening is observed.", ""),
    ("The interlobular septa are thickened at the bases.", "+IS"),
    ("Inter-intralobular septal thickness increases are observed.", "+IS"),
    ("Tubular bronchiectasis and peribronchial thickening are observed in the lingula.", "+BR +PT"),
    ("No bronchiectasis or peribronchial thickening.", "-BR -PT"),
    ("Consolidation was not observed except in the right lower lobe.", "-CO"),
    ("No pulmonary nodule other than a 4 mm nodule in the lingula.", "+LN"),
    ("Pleural effusion could not be evaluated.", ""),
    ("Lymphadenopathy cannot be excluded in this non-contrast examination.", "?LAP"),
    ("Subpleural density increases, which may belong to atelectasis.", "+LO ?AT"),
    ("Atelectasis? Consolidation?", "?AT ?CO"),
    ("A chest tube is in place in the right hemithorax.", "+MM"),
    ("Port catheter with its tip in the right atrium.", "+MM"),
    ("The hepatic portal vein is patent.", ""),
    ("No pacemaker or other medical device.", "-MM"),
    ("Technique: noncontrast CT with a catheter phantom. Findings: No nodule.", "-LN"),
    ("Findings: No effusion. Impression: Emphysema.", "-PLE +EM"),
    ("Indication: emphysema", ""),
    ("There was an effusion on the previous study.", ""),
    ("The opacity seen in the previous study persists.", "+LO"),
    ("Pulmonary nodules have not changed.", "+LN"),
    ("No change in the emphysema.", "+EM"),
    ("No increase in the size of the nodule was detected.", "+LN"),
    ("Complete resolution of the consolidation.", "-CO"),
    (
        "Consolidation in the right lower lobe, "
        "pleural effusion and pericardial effusion are not seen.",
        "+CO -PLE -PE",
    ),
    ("Emphysema without nodules.", "+EM -LN"),
    ("Lungs: clear. Pleura: no effusion.", "-PLE"),
    ("The lungs are clear.", "-LO -CO -LN -AT"),
    ("findings: consolidation in the left lung. no nodule. impression: pneumonia", "+CO -LN"),
    ("Effusion, consolidation or nodule: none.", "-PLE -CO -LN"),
    (
        "Pericardial effusion, pneumothorax, and lymphadenopathy: not seen. Emphysema: mild.",
        "-PE -LAP +EM",
    ),
    ("Small pleural effusion, nodules: none.", "+PLE -LN"),
    ("Atelectasis in the lingula, consolidation: none.", "+AT -CO"),
    ("Without pleural effusion, consolidation is present in the left lower lobe.", "-PLE +CO"),
    (
        "Without pneumothorax or effusion, nodules and emphysema are observed in both lungs.",
        "-PLE +LN +EM",
    ),
    ("Without pleural effusion, pneumothorax or consolidation.", "-PLE -CO"),
    ("Without pleural effusion, consolidation or nodule was observed.", "-PLE -CO -LN"),
    (
        "There are nodules, without effusion, pneumothorax or consolidation, "
        "and the heart is enlarged.",
        "+LN -PLE -CO +CM",
    ),
    ("Without pleural effusion, consolidation is not seen.", "-PLE -CO"),
    (
        "In the absence of effusion, pleural fluid, or lymphadenopathy, a hiatal hernia is seen.",
        "-PLE -LAP +HH",
    ),
    # What is denied is something new only, a part, or a change.
    ("Stable nodules with no new consolidation.", "+LN"),
    ("Emphysema and sequelae are stable with no new lesions.", "+EM +FS"),
    ("Bilateral pleural effusions have improved with no new consolidation.", "+PLE"),
    ("Emphysema in both lungs with no newly developed nodule.", "+EM"),
    ("New nodule was not observed.", ""),
    ("No consolidation or new nodule.", "-CO"),
    ("New consolidation in the lingula without effusion.", "+CO -PLE"),
    ("No new lesion, small effusion on the left.", "+PLE"),
    ("Partial resolution of the left pleural effusion.", "+PLE"),
    ("Effusion has partially resolved.", "+PLE"),
    ("Incompletely resolved consolidation in the left lower lobe.", "+CO"),
    ("Near complete resolution of the pleural effusion.", "+PLE"),
    ("Consolidation has mostly resolved.", "+CO"),
    ("Ground glass opacities have largely resolved.", "+LO"),
    ("Cardiomegaly has resolved partially.", "+CM"),
    ("Some of the nodules have resolved, others persist.", "+LN"),
    ("No resolution of the pleural effusion.", "+PLE"),
    ("The consolidation has not yet resolved.", "+CO"),
    ("Nodules stable, effusion resolved.", "+LN -PLE"),
    ("No significant dimensional change was detected in the previously described nodules.", "+LN"),
    ("No size change in the nodule.", "+LN"),
    ("No obvious size difference was detected in the nodules.", "+LN"),
    ("No dimensional change was observed in the nodules.", "+LN"),
    ("No significant size or number change in the nodules.", "+LN"),
    ("There is no significant difference in terms of number and size of nodules.", "+LN"),
    ("Significant dimensional change was not detected in the nodules.", "+LN"),
    ("A significant change in the size of the nodules was not detected.", "+LN"),
    ("No significant improvement in consolidation.", "+CO"),
    ("No worsening of the pleural effusion.", "+PLE"),
    ("No enlargement of the nodule.", "+LN"),
    ("No evidence of progression of nodules.", "+LN"),
    ("No evidence of pulmonary fibrosis progression.", "+FS"),
    ("No enlargement of the heart.", "-CM"),
    ("No cardiac enlargement.", "-CM"),
    ("Heart size is not increased.", "-CM"),
    ("No enlarged lymph nodes.", "-LAP"),
    ("No enlargement of mediastinal lymph nodes.", "-LAP"),
    ("No increase in density was detected in the lung parenchyma.", "-LO"),
    ("No increase in bronchial wall thickness.", "-PT"),
    ("Emphysematous changes were not observed.", "-EM"),
    ("No changes consistent with emphysema.", "-EM"),
    # What stands beside another organ, another vessel, or near one.
    ("Old rib fractures and sequelae changes in the lung apices.", "+FS"),
    (
        "Sequela changes are observed in both lungs and degenerative osteophytes in the vertebrae.",
        "+FS",
    ),
    ("Rib fractures with fibrotic sequelae in the adjacent lung.", "+FS"),
    ("Post-traumatic sequelae in the left 5th, 6th and 7th ribs.", ""),
    ("Ground glass opacities in both lungs, fatty liver.", "+LO"),
    ("Fatty infiltration of the liver and ground glass opacities in the lungs.", "+LO"),
    ("Nodules in the breast and ground glass opacities in the right lung.", "+LO"),
    ("Metastatic nodules in the liver and lungs.", "+LN"),
    ("Bilateral effusions and ascites.", "+PLE"),
    ("Aortic calcification without coronary calcification.", "+AWC -CAC"),
    ("Aorta and coronary arteries without calcification.", "-AWC -CAC"),
    ("Calcified mediastinal lymph nodes adjacent to the aorta.", ""),
    ("Calcifications in the mediastinal lymph nodes next to the aortic arch.", ""),
    ("Calcified lymph nodes in the aortopulmonary window.", ""),
    ("Calcified nodule in the right upper lobe near the aortic arch.", "+LN"),
    ("Calcified pleural plaques and aortic wall calcifications.", "+AWC"),
    ("Calcification in the left anterior descending coronary artery.", "+CAC"),
    # The past, and what of it is still there.
    ("Patient with a history of lung cancer, multiple nodules are seen in both lungs.", "+LN"),
    ("History of COVID-19 pneumonia, ground glass opacities are seen in both lungs.", "+LO"),
    ("History of emphysema, bronchiectasis and lymphoma.", ""),
    ("Nodules seen in the previous CT are present in this examination.", "+LN"),
    ("A nodule measuring 5 mm in the previous CT measures 8 mm.", "+LN"),
    ("The nodule, also seen in the previous examination, measures 6 mm.", "+LN"),
    ("Pleural effusion, which was present in the previous examination, is observed.", "+PLE"),
    ("The effusion, seen in the previous CT, was not observed.", "-PLE"),
    ("In the previous examination, there was a nodule in the lingula.", ""),
    ("In the previous examination, a nodule is observed in the lingula.", ""),
    ("The nodule that has been described in the previous examination.", ""),
    # Normal thickness, what is unlikely, what was removed.
    ("Bronchial wall thickness is within normal limits.", "-PT"),
    ("Peribronchial wall thickness is normal.", "-PT"),
    ("Interlobular septal thickness is normal.", "-IS"),
    ("Consolidation is unlikely.", "-CO"),
    ("Consolidation or atelectasis is unlikely.", "-CO -AT"),
    ("Nodule in the lingula, malignancy is unlikely.", "+LN"),
    ("Nodule in the lingula, unlikely to be malignant.", "+LN"),
    ("Chest tube removed.", "-MM"),
    ("The endotracheal tube has been removed.", "-MM"),
    ("The endotracheal tube and the nasogastric tube have been removed.", "-MM"),
    ("Interval removal of the chest tube.", "-MM"),
    ("Interval removal of the chest tube, central venous catheter is in place.", "+MM"),
    ("Gallbladder removed, surgical clips are seen.", "+MM"),
    ("Suture materials are seen secondary to the removal of the left lower lobe.", "+MM"),
    ("Emphysema in both lungs and the gallbladder was removed.", "+EM"),
)
