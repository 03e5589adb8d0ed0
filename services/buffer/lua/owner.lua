-- Returns {token, beats, released, record} of the owner; nil without one. Read-only.
local token = owner_has('token')
return token and { token, owner_has('beats') or '', owner_has('released') or '', owner_has('record') or '' }
