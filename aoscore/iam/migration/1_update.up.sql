-- The PIN inside of a URL becomes the name of the file that holds it. The table `pins` (path, value) is filled by the
-- program that runs this script. A URL without such a part, or with a PIN that no file holds, stays as it is.
UPDATE certificates SET certURL = (
    SELECT substr(certURL, 1, instr(certURL, 'pin-value=') - 1) || 'pin-source=' || pins.path FROM pins
    WHERE pins.value = substr(certURL, instr(certURL, 'pin-value=') + 10) ORDER BY pins.rowid DESC LIMIT 1)
WHERE instr(certURL, 'pin-value=') > 0
    AND substr(certURL, instr(certURL, 'pin-value=') + 10) IN (SELECT value FROM pins);
UPDATE certificates SET keyURL = (
    SELECT substr(keyURL, 1, instr(keyURL, 'pin-value=') - 1) || 'pin-source=' || pins.path FROM pins
    WHERE pins.value = substr(keyURL, instr(keyURL, 'pin-value=') + 10) ORDER BY pins.rowid DESC LIMIT 1)
WHERE instr(keyURL, 'pin-value=') > 0
    AND substr(keyURL, instr(keyURL, 'pin-value=') + 10) IN (SELECT value FROM pins);
