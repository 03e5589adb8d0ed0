-- Answers token, beats, whether it was released, and the record of the owner; nothing without one. Read-only.
local token = owner_has('token')
return token and { token, owner_has('beats') or '', owner_has('released') or '', owner_has('record') or '' }
