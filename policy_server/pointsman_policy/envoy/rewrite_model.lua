-- Makes the body name a model that the endpoint of THIS attempt serves.
--
-- Runs once per attempt, so also on a retry to another expert and when the policy server is away
-- and the body still names a policy. The filter before this one puts the endpoint's names into
-- SERVED. A body that is no JSON object, or that names no model, passes unchanged: refusing it is
-- for the engine. The scan leaps over strings with plain finds, so that its cost follows their
-- number and not their length.
local SERVED = "x-pointsman-served-models"

local byte, char, find, floor, sub = string.byte, string.char, string.find, math.floor, string.sub
local QUOTE, BACKSLASH, COLON, COMMA, OPEN_BRACE, CLOSE_BRACE, OPEN_BRACKET =
  34, 92, 58, 44, 123, 125, 91

local function skip_space(text, from)
  return find(text, "[^ \t\r\n]", from)
end

-- Position of the quote that ends the string whose content starts at `from`; nil if there is none.
local function string_end(text, from)
  local quote = find(text, '"', from, true)
  while quote do
    local last = quote - 1
    while last >= from and byte(text, last) == BACKSLASH do
      last = last - 1
    end
    if (quote - 1 - last) % 2 == 0 then
      return quote
    end
    quote = find(text, '"', quote + 1, true)
  end
  return nil
end

-- Position behind the value that starts at `from`; nil if it does not end.
local function value_end(text, from)
  local first = byte(text, from)
  if first == QUOTE then
    local quote = string_end(text, from + 1)
    return quote and quote + 1
  end
  if first ~= OPEN_BRACE and first ~= OPEN_BRACKET then
    return find(text, "[,}%] \t\r\n]", from)
  end
  local depth, position = 1, from + 1
  while depth > 0 do
    position = find(text, '["{}%[%]]', position)
    if not position then
      return nil
    end
    local token = byte(text, position)
    if token == QUOTE then
      position = string_end(text, position + 1)
      if not position then
        return nil
      end
    elseif token == OPEN_BRACE or token == OPEN_BRACKET then
      depth = depth + 1
    else
      depth = depth - 1
    end
    position = position + 1
  end
  return position
end

local function utf8(code)
  if code < 0x80 then
    return char(code)
  elseif code < 0x800 then
    return char(0xC0 + floor(code / 0x40), 0x80 + code % 0x40)
  elseif code < 0x10000 then
    return char(0xE0 + floor(code / 0x1000), 0x80 + floor(code / 0x40) % 0x40, 0x80 + code % 0x40)
  end
  return char(0xF0 + floor(code / 0x40000), 0x80 + floor(code / 0x1000) % 0x40,
    0x80 + floor(code / 0x40) % 0x40, 0x80 + code % 0x40)
end

local SHORT_ESCAPES = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

-- The text that a JSON string stands for. Unknown escapes stay as they are: the engine refuses
-- such a body whatever the model.
local function unescape(raw)
  if not find(raw, "\\", 1, true) then
    return raw
  end
  local parts, position = {}, 1
  while true do
    local slash = find(raw, "\\", position, true)
    if not slash then
      parts[#parts + 1] = sub(raw, position)
      return table.concat(parts)
    end
    parts[#parts + 1] = sub(raw, position, slash - 1)
    local letter = sub(raw, slash + 1, slash + 1)
    local unit = letter == "u" and tonumber(string.match(raw, "^%x%x%x%x", slash + 2) or "", 16)
    position = slash + 2
    if unit then
      position = slash + 6
      local low = tonumber(string.match(raw, "^\\u([dD][c-fC-F]%x%x)", position) or "", 16)
      if low and unit >= 0xD800 and unit < 0xDC00 then
        unit, position = 0x10000 + (unit - 0xD800) * 0x400 + low - 0xDC00, position + 6
      end
      parts[#parts + 1] = utf8(unit)
    else
      parts[#parts + 1] = SHORT_ESCAPES[letter] or letter
    end
  end
end

local function quoted(name)
  return '"' .. name:gsub('[%z\1-\31"\\]', function(c)
    return string.format("\\u%04x", byte(c))
  end) .. '"'
end

-- First and last positions (quotes included) of every value of a top-level "model" that is a
-- string, as a flat list; nil when the text is no JSON object. All of them, because parsers differ
-- on which of two equal keys counts.
local function models_in(text)
  local found = {}
  local position = skip_space(text, 1)
  if not position or byte(text, position) ~= OPEN_BRACE then
    return nil
  end
  position = skip_space(text, position + 1)
  if position and byte(text, position) == CLOSE_BRACE then
    return not skip_space(text, position + 1) and found or nil
  end
  while position and byte(text, position) == QUOTE do
    local quote = string_end(text, position + 1)
    if not quote then
      return nil
    end
    local is_model = unescape(sub(text, position + 1, quote - 1)) == "model"
    position = skip_space(text, quote + 1)
    if not position or byte(text, position) ~= COLON then
      return nil
    end
    local value = skip_space(text, position + 1)
    local behind = value and value_end(text, value)
    if not behind then
      return nil
    end
    if is_model and byte(text, value) == QUOTE then
      found[#found + 1] = value
      found[#found + 1] = behind - 1
    end
    position = skip_space(text, behind)
    local separator = position and byte(text, position)
    if separator == CLOSE_BRACE then
      return not skip_space(text, position + 1) and found or nil
    elseif separator ~= COMMA then
      return nil
    end
    position = skip_space(text, position + 1)
  end
  return nil
end

-- The text with every model that is not among `served` replaced by the first of them; nil when
-- nothing needs to change.
local function rewritten(text, served)
  local models = models_in(text)
  if not models then
    return nil
  end
  local parts, position = {}, 1
  for i = 1, #models, 2 do
    if not served[unescape(sub(text, models[i] + 1, models[i + 1] - 1))] then
      parts[#parts + 1] = sub(text, position, models[i] - 1)
      parts[#parts + 1] = quoted(served[1])
      position = models[i + 1] + 1
    end
  end
  if position == 1 then
    return nil
  end
  parts[#parts + 1] = sub(text, position)
  return table.concat(parts)
end

function envoy_on_request(handle)
  local names = handle:headers():get(SERVED)
  handle:headers():remove(SERVED)
  -- Waits for the end of the body. Objects taken from the handle before are void afterwards.
  local body = handle:body()
  if not body then
    return
  end
  local served = {}
  for name in string.gmatch(names or "", "[^,]+") do
    served[#served + 1] = name
    served[name] = true
  end
  local text = served[1] and rewritten(body:getBytes(0, body:length()), served)
  local length = text and body:setBytes(text) or body:length()
  -- Always: an earlier attempt left its own length in the headers, which attempts share.
  handle:headers():replace("content-length", tostring(length))
end
