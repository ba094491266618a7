-- The reverse of the step up: the name of a PIN file becomes the PIN that it holds.
UPDATE certificates SET certURL = (
    SELECT substr(certURL, 1, instr(certURL, 'pin-source=') - 1) || 'pin-value=' || pins.value FROM pins
    WHERE pins.path = substr(certURL, instr(certURL, 'pin-source=') + 11) ORDER BY pins.rowid DESC LIMIT 1)
WHERE instr(certURL, 'pin-source=') > 0
    AND substr(certURL, instr(certURL, 'pin-source=') + 11) IN (SELECT path FROM pins);
UPDATE certificates SET keyURL = (
    SELECT substr(keyURL, 1, instr(keyURL, 'pin-source=') - 1) || 'pin-value=' || pins.value FROM pins
    WHERE pins.path = substr(keyURL, instr(keyURL, 'pin-source=') + 11) ORDER BY pins.rowid DESC LIMIT 1)
WHERE instr(keyURL, 'pin-source=') > 0
    AND substr(keyURL, instr(keyURL, 'pin-source=') + 11) IN (SELECT path FROM pins);
